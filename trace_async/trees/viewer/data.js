// The run's data: embedded in the page, or asked for from the server that the page came from.

const $ = (id) => document.getElementById(id);
const POLL_MS = 3000;
const LOADED_AHEAD = 50; // so many of the newest updates are loaded by themselves, for search

// Texts are only ever put into the page by this function and by canvas, so they stay text.
function element(tag, { className = "", text = "", title = "", children = [] } = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  if (title) made.title = title;
  made.append(...children);
  return made;
}

const run = { name: "", about: "", updates: [], trees: new Map(), curves: {}, live: false, left_out: "" };

async function loadRun(onChange) {
  const data = JSON.parse($("data").textContent);
  if (data !== null) {
    Object.assign(run, data.run);
    for (const { update, trees } of data.updates) run.trees.set(update, trees);
    onChange();
    return;
  }
  run.live = true;
  await refresh(onChange);
  setInterval(() => refresh(onChange).catch(() => { run.live = false; onChange(); }), POLL_MS);
}

let refreshing = false;
async function refresh(onChange) {
  if (refreshing) return;
  refreshing = true;
  try {
    const before = run.updates.length;
    Object.assign(run, await ask("api/run"), { live: true });
    if (run.updates.length !== before) run.curves = await ask("api/curves");
    onChange();
    for (const update of run.updates.slice(-LOADED_AHEAD).reverse()) await loadUpdate(update, onChange);
  } finally {
    refreshing = false;
  }
}

async function loadUpdate(update, onChange) {
  if (run.trees.has(update) || !run.updates.includes(update)) return;
  run.trees.set(update, await ask(`api/update/${update}`));
  onChange();
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

// All trees that are loaded, newest update first: {update, index, tree}.
function allTrees() {
  const found = [];
  for (const update of [...run.trees.keys()].sort((a, b) => b - a)) {
    run.trees.get(update).forEach((tree, index) => found.push({ update, index, tree }));
  }
  return found;
}

// Everything of a tree that a search looks at, in lower case; made once.
const texts = new WeakMap();
function textOf(tree) {
  if (!texts.has(tree)) {
    const parts = tree.nodes.map((node) => node.tokens.join("") + "\n" + node.seen);
    texts.set(tree, [tree.task, tree.kind, tree.domain, ...parts].join("\n").toLowerCase());
  }
  return texts.get(tree);
}

const rewardMark = (reward) => (reward > 0.5 ? "✓" : "✗");
const show = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(3);

// A figure in few characters: 4 significant digits, thousands as k and M.
function figure(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return String(+value.toPrecision(4));
}
