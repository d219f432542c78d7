// The tree on a canvas: only what is in sight is drawn, so that ten thousand nodes stay smooth.

const view = { scale: 1, left: 0, top: 0 }; // of the tree's plane: what is at the canvas's upper left corner
let drawn = null; // {tree, chosen, path, found}
let frame = 0;

function showTree(tree, chosen, found) {
  const isOther = !drawn || drawn.tree !== tree;
  drawn = { tree, chosen, path: new Set(pathTo(tree, chosen)), found };
  if (isOther) fitTree();
  reveal(chosen);
  redraw();
}

function redraw() {
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; draw(); });
}

function fitTree() {
  if (!drawn) return;
  const canvas = $("drawing"), layout = layoutOf(drawn.tree);
  const wide = canvas.clientWidth / (layout.width + 130), high = canvas.clientHeight / (layout.height + 70);
  view.scale = Math.min(1.4, Math.max(0.35, Math.min(wide, high)));
  view.left = -30 / view.scale;
  const spare = canvas.clientHeight / view.scale - layout.height;
  view.top = spare > 60 ? -spare / 2 : -30;
  redraw();
}

// Move the view as little as brings `node` into sight.
function reveal(node) {
  const canvas = $("drawing"), { x, y } = layoutOf(drawn.tree);
  const width = canvas.clientWidth / view.scale, height = canvas.clientHeight / view.scale, edge = 40 / view.scale;
  view.left = Math.min(x[node] - edge, Math.max(view.left, x[node] - width + 3 * edge));
  view.top = Math.min(y[node] - edge, Math.max(view.top, y[node] - height + 2 * edge));
}

function zoom(factor, atX = $("drawing").clientWidth / 2, atY = $("drawing").clientHeight / 2) {
  const scale = Math.min(4, Math.max(0.05, view.scale * factor));
  view.left += atX / view.scale - atX / scale;
  view.top += atY / view.scale - atY / scale;
  view.scale = scale;
  redraw();
}

function draw() {
  const canvas = $("drawing"), pen = canvas.getContext("2d"), dense = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * dense) || canvas.height !== Math.round(height * dense)) {
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
  }
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!drawn) return;
  const colours = getComputedStyle(document.documentElement);
  const colour = (name) => colours.getPropertyValue(name);
  pen.setTransform(dense * view.scale, 0, 0, dense * view.scale, -view.left * view.scale * dense,
    -view.top * view.scale * dense);
  const layout = layoutOf(drawn.tree);
  const first = Math.floor(view.left / COLUMN) - 1;
  const last = Math.ceil((view.left + width / view.scale) / COLUMN) + 1;
  const top = view.top - ROW, bottom = view.top + height / view.scale + ROW;
  const nodes = [];
  for (let column = Math.max(0, first); column <= last; column += 1) nodes.push(...inSight(layout, column, top, bottom));
  drawEdges(pen, layout, nodes, colour);
  for (const node of nodes) drawNode(pen, layout, node, colour);
  canvas.dataset.drawn = nodes.length; // for tests
}

function drawEdges(pen, layout, nodes, colour) {
  const { tree, path } = drawn, shown = new Set(nodes);
  for (const node of nodes) for (const child of layout.children[node]) shown.add(child);
  for (const bold of [false, true]) {
    for (const node of shown) {
      if (node === 0 || path.has(node) !== bold) continue;
      const parent = tree.nodes[node].parent;
      const px = layout.x[parent], py = layout.y[parent], x = layout.x[node], y = layout.y[node];
      pen.beginPath();
      pen.moveTo(px, py);
      pen.bezierCurveTo((px + x) / 2, py, (px + x) / 2, y, x, y);
      pen.setLineDash(tree.rollouts[tree.nodes[node].rollout].kind === "continuation" ? [4, 3] : []);
      pen.lineWidth = bold ? 2.5 : 1.3;
      pen.strokeStyle = colour(bold ? "--ink" : "--edge");
      pen.stroke();
    }
  }
  pen.setLineDash([]);
}

function drawNode(pen, layout, index, colour) {
  const { tree, chosen, found } = drawn, node = tree.nodes[index], x = layout.x[index], y = layout.y[index];
  pen.beginPath();
  if (node.context) pen.rect(x - 6, y - 6, 12, 12); // where another conversation of the rollout begins
  else pen.arc(x, y, 7, 0, 2 * Math.PI);
  pen.fillStyle = valueColour(node.value);
  pen.fill();
  pen.lineWidth = node.why && index ? 3 : 1;
  pen.strokeStyle = colour(node.why && index ? "--mark" : "--ink");
  pen.stroke();
  if (index === chosen || found.has(index)) {
    pen.beginPath();
    pen.arc(x, y, index === chosen ? 11 : 10, 0, 2 * Math.PI);
    pen.lineWidth = index === chosen ? 2.5 : 1.5;
    pen.strokeStyle = colour(index === chosen ? "--ink" : "--no");
    pen.stroke();
  }
  if (node.reward !== null && view.scale > 0.3) {
    pen.font = "600 11px system-ui, sans-serif";
    pen.fillStyle = colour(node.reward > 0.5 ? "--yes" : "--no");
    const graded = node.reward > 0 && node.reward < 1 ? ` ${show(node.reward)}` : "";
    pen.fillText(`${rewardMark(node.reward)}${graded}  ${node.rollout}`, x + 12, y + 4);
  }
}

// The node under a point of the canvas, or -1.
function nodeAt(px, py) {
  if (!drawn) return -1;
  const layout = layoutOf(drawn.tree), x = view.left + px / view.scale, y = view.top + py / view.scale;
  const reach = Math.max(11, 8 / view.scale);
  for (const node of inSight(layout, Math.round(x / COLUMN), y - reach, y + reach)) {
    if (Math.hypot(layout.x[node] - x, layout.y[node] - y) <= reach) return node;
  }
  return -1;
}

function listenToDrawing(onChoose) {
  const canvas = $("drawing");
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, y: event.clientY, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (held) {
      const dx = event.clientX - held.x, dy = event.clientY - held.y;
      if (!held.moved && Math.hypot(dx, dy) < 4) return;
      view.left -= dx / view.scale;
      view.top -= dy / view.scale;
      held = { x: event.clientX, y: event.clientY, moved: true };
      redraw();
    }
    showTip(event);
  });
  canvas.addEventListener("pointerup", (event) => {
    const node = held && !held.moved ? nodeAt(event.offsetX, event.offsetY) : -1;
    held = null;
    if (node >= 0) onChoose(node);
  });
  canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 200), event.offsetX, event.offsetY);
    else { view.left += event.deltaX / view.scale; view.top += event.deltaY / view.scale; redraw(); }
  }, { passive: false });
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function showTip(event) {
  const node = nodeAt(event.offsetX, event.offsetY), tip = $("tip");
  tip.hidden = node < 0;
  if (node < 0) return;
  const { tree } = drawn, it = tree.nodes[node];
  const said = it.tokens.join("").trim() || it.seen.trim();
  tip.textContent = `${nameOf(tree, node)}   V ${show(it.value)} → ${show(it.after)}\n${said.slice(0, 160)}`;
  tip.style.left = `${Math.min(event.offsetX + 14, $("drawing").clientWidth - 330)}px`;
  tip.style.top = `${event.offsetY + 14}px`;
}
