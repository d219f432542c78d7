// The run's figures by update, beside its trees. A click goes to the trees of the nearest update.

const FIRST_SHOWN = [/^heldout\/success_t1\.0$/, /^train\/effective_ratio$/, /^train\/reward$/, /^tokens\/generated$/,
  /^loss\/|^learner\/loss/, /^heldout\/success_t/];
const MAX_CHARTS = 12;

function chosenCurves() {
  const names = Object.keys(run.curves), words = $("curve-search").value.toLowerCase().trim();
  if (words) return names.filter((name) => name.toLowerCase().includes(words)).slice(0, MAX_CHARTS);
  const first = FIRST_SHOWN.flatMap((wanted) => names.filter((name) => wanted.test(name)).slice(0, 2));
  return [...new Set(first)].slice(0, 6);
}

function showCurves(update, onUpdate) {
  if ($("curves").hidden) return;
  const names = chosenCurves();
  $("charts").replaceChildren(...names.map((name) => chartOf(name, update, onUpdate)));
  if (!names.length) $("charts").append(element("span", { className: "empty", text: "no figures of that name" }));
  names.forEach((name, i) => drawCurve($("charts").children[i].querySelector("canvas"), run.curves[name], update));
}

function chartOf(name, update, onUpdate) {
  const [steps, values] = run.curves[name], canvas = element("canvas");
  const at = steps.lastIndexOf(update), value = at >= 0 ? values[at] : values[values.length - 1];
  const head = element("div", { children: [element("span", { text: name, title: name }),
    element("b", { text: figure(value) })] });
  const chart = element("div", { className: "chart", children: [head, canvas] });
  chart.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    onUpdate(steps[0] + share * (steps[steps.length - 1] - steps[0]));
  });
  return chart;
}

function drawCurve(canvas, [steps, values], update) {
  const dense = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * dense;
  canvas.height = height * dense;
  const pen = canvas.getContext("2d"), colours = getComputedStyle(document.documentElement);
  pen.scale(dense, dense);
  const [first, last] = [steps[0], steps[steps.length - 1]];
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  const x = (step) => (last === first ? width / 2 : ((step - first) / (last - first)) * (width - 8) + 4);
  const y = (value) => (high === low ? height / 2 : height - 14 - ((value - low) / (high - low)) * (height - 24));
  if (update !== null && update >= first && update <= last) {
    pen.fillStyle = colours.getPropertyValue("--mark");
    pen.fillRect(x(update) - 0.5, 0, 1, height);
  }
  pen.beginPath();
  steps.forEach((step, i) => (i ? pen.lineTo(x(step), y(values[i])) : pen.moveTo(x(step), y(values[i]))));
  pen.lineWidth = 1.6;
  pen.strokeStyle = `rgb(${colours.getPropertyValue("--plus")})`;
  pen.stroke();
  if (steps.length < 8) for (let i = 0; i < steps.length; i += 1) pen.fillRect(x(steps[i]) - 2, y(values[i]) - 2, 4, 4);
  pen.font = "10px system-ui, sans-serif";
  pen.fillStyle = colours.getPropertyValue("--dim");
  pen.fillText(figure(high), 4, 9);
  pen.fillText(`${figure(low)}   ${first}–${last}`, 4, height - 2);
}
