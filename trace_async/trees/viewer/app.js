// What is chosen (update, tree, node), how it is reached, and its address: #u=12&t=0&n=5.

const KEYS = [
  ["j  k", "next, previous tree"], ["[  ]", "previous, next update with trees"], ["← →", "to the parent, the first child"],
  ["↑ ↓", "to the turn above, below"], ["0 … 9", "to the end of that rollout"], ["n", "next turn that the search finds"],
  ["/", "search"], ["f  +  -", "fit, zoom in, zoom out (or Ctrl and wheel)"], ["c", "curves"], ["?", "this help"],
];
let chosen = null; // {update, index, node}

function currentTree() {
  return chosen ? run.trees.get(chosen.update)?.[chosen.index] : undefined;
}

function choose(update, index, node) {
  chosen = { update, index, node };
  history.replaceState(null, "", `#u=${update}&t=${index}&n=${node}`);
  showAll();
}

const chooseNode = (node) => choose(chosen.update, chosen.index, node);

function chooseTree(entry) {
  if (entry) choose(entry.update, entry.index, 0);
}

// The update with trees that is nearest to `step`.
function chooseUpdate(step) {
  const updates = [...run.updates];
  if (!updates.length) return;
  const nearest = updates.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
  if ($("update").value !== "") $("update").value = nearest;
  loadUpdate(nearest, changed).then(() => {
    filterTrees();
    chooseTree(listed.find(({ update }) => update === nearest) ?? { update: nearest, index: 0 });
  });
}

function showAll() {
  showList(chosen);
  const tree = currentTree();
  if (!tree) {
    $("detail").replaceChildren(element("p", { className: "empty",
      text: run.updates.length ? "No tree is chosen." : "No trees yet: they come with the first update." }));
    return;
  }
  scrollToChosen(chosen);
  showHead(tree, chosen.node, chooseNode);
  showTree(tree, chosen.node, foundNodes(tree));
  showDetail(tree, chosen.node, chooseNode);
  showCurves(chosen.update, chooseUpdate);
}

// From the address, or the first tree with both outcomes.
function chooseFirst() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const [update, index, node] = ["u", "t", "n"].map((key) => Number.parseInt(asked.get(key) ?? "", 10));
  const tree = run.trees.get(update)?.[index];
  if (tree) return choose(update, index, tree.nodes[node] ? node : 0);
  if (run.live && run.updates.includes(update) && !run.trees.has(update)) return loadUpdate(update, changed);
  return chooseTree(listed.find(({ tree: it }) => it.both) ?? listed[0]);
}

function changed() {
  $("title").textContent = run.name;
  $("about").textContent = run.about;
  $("live").hidden = !run.live;
  fillFilters();
  filterTrees();
  if (!currentTree()) chooseFirst();
  if (!currentTree()) showAll();
  else { showList(chosen); showCurves(chosen.update, chooseUpdate); }
}

function refilter() {
  filterTrees();
  $("list").scrollTop = 0;
  const update = Number($("update").value);
  if ($("update").value !== "") loadUpdate(update, changed);
  const isListed = chosen && listed.some((it) => it.update === chosen.update && it.index === chosen.index);
  if (!isListed && listed.length) chooseTree(listed[0]);
  else showAll();
}

function step(by) {
  const place = listed.findIndex(({ update, index }) => chosen && update === chosen.update && index === chosen.index);
  chooseTree(listed[Math.min(listed.length - 1, Math.max(0, place + by))]);
}

function stepUpdate(by) {
  const place = run.updates.indexOf(chosen.update) + by;
  if (run.updates[place] !== undefined) chooseUpdate(run.updates[place]);
}

function moveInColumn(by) {
  const tree = currentTree(), layout = layoutOf(tree), column = layout.columns[tree.nodes[chosen.node].depth];
  const to = column[column.indexOf(chosen.node) + by];
  if (to !== undefined) chooseNode(to);
}

function nextFound() {
  const tree = currentTree(), found = [...foundNodes(tree)];
  if (found.length) chooseNode(found.find((node) => node > chosen.node) ?? found[0]);
}

function toggleCurves() {
  const curves = $("curves");
  curves.hidden = !curves.hidden;
  $("show-curves").setAttribute("aria-pressed", String(!curves.hidden));
  showAll();
}

const ACTIONS = {
  j: () => step(1),
  k: () => step(-1),
  "[": () => stepUpdate(-1),
  "]": () => stepUpdate(1),
  ArrowLeft: () => chooseNode(Math.max(0, currentTree().nodes[chosen.node].parent)),
  ArrowRight: () => { const [child] = layoutOf(currentTree()).children[chosen.node]; if (child) chooseNode(child); },
  ArrowUp: () => moveInColumn(-1),
  ArrowDown: () => moveInColumn(1),
  n: nextFound,
  "/": () => $("search").focus(),
  f: fitTree,
  "+": () => zoom(1.25),
  "-": () => zoom(0.8),
  c: toggleCurves,
  "?": () => $("help").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT)$/.test(event.target.tagName)) {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur();
    return;
  }
  const rollout = /^[0-9]$/.test(event.key) ? currentTree()?.rollouts[Number(event.key)] : undefined;
  const action = rollout ? () => chooseNode(rollout.leaf) : ACTIONS[event.key];
  if (!action || (!chosen && !"/c?".includes(event.key))) return;
  event.preventDefault();
  action();
}

function listen() {
  for (const id of ["search", "update", "kind", "outcome"]) $(id).addEventListener("input", refilter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", () => showList(chosen), { passive: true });
  $("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) chooseTree(listed[Number(row.dataset.place)]);
  });
  new ResizeObserver(() => showList(chosen)).observe($("list"));
  $("curve-search").addEventListener("input", () => showCurves(chosen?.update ?? null, chooseUpdate));
  $("show-curves").addEventListener("click", toggleCurves);
  $("show-help").addEventListener("click", () => $("help").showModal());
  $("fit").addEventListener("click", fitTree);
  $("zoom-in").addEventListener("click", () => zoom(1.25));
  $("zoom-out").addEventListener("click", () => zoom(0.8));
  $("help").addEventListener("click", () => $("help").close());
  addEventListener("hashchange", () => { chosen = null; changed(); });
  document.addEventListener("keydown", onKey);
  listenToDrawing(chooseNode);
  const list = element("dl");
  for (const [keys, meaning] of KEYS) {
    const shown = element("dt", { children: keys.split(/\s+/).map((key) => element("kbd", { text: key })) });
    list.append(shown, element("dd", { text: meaning }));
  }
  $("help").append(list);
}

listen();
loadRun(changed).catch((error) => { $("about").textContent = `The run cannot be read: ${error.message}`; });
