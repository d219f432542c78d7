// The list of trees: filtered, searched, and drawn only where it is in sight.

const ROW_HEIGHT = 52;
let listed = []; // {update, index, tree}, as filtered

function filterTrees() {
  const words = $("search").value.toLowerCase().trim(), update = $("update").value;
  const kind = $("kind").value, outcome = $("outcome").value;
  listed = allTrees().filter(({ update: of, tree }) => (
    (update === "" || of === Number(update))
    && (kind === "" || tree.kind === kind)
    && hasOutcome(tree, outcome)
    && (words === "" || textOf(tree).includes(words))
  ));
}

function hasOutcome(tree, outcome) {
  if (outcome === "both") return tree.both;
  if (outcome === "won") return tree.rollouts.every(({ reward }) => reward > 0.5);
  if (outcome === "lost") return tree.rollouts.every(({ reward }) => reward <= 0.5);
  if (outcome === "expanded") return tree.rollouts.some(({ kind }) => kind === "continuation");
  return true;
}

// The nodes of `tree` whose text the search finds.
function foundNodes(tree) {
  const words = $("search").value.toLowerCase().trim(), found = new Set();
  if (words === "") return found;
  tree.nodes.forEach((node, index) => {
    if ((node.tokens.join("") + "\n" + node.seen).toLowerCase().includes(words)) found.add(index);
  });
  return found;
}

function fillSelect(id, first, values) {
  const select = $(id), chosen = select.value;
  const options = [["", first], ...values];
  if (select.options.length === options.length) return;
  select.replaceChildren(...options.map(([value, text]) => {
    const option = element("option", { text });
    option.value = value;
    return option;
  }));
  select.value = options.some(([value]) => String(value) === chosen) ? chosen : "";
}

function fillFilters() {
  fillSelect("update", "all updates", [...run.updates].reverse().map((update) => [update, `update ${update}`]));
  const kinds = [...new Set(allTrees().map(({ tree }) => tree.kind))].sort();
  fillSelect("kind", "all kinds", kinds.map((kind) => [kind, kind]));
}

function showList(chosen) {
  const loaded = allTrees().length;
  $("count").textContent = `${listed.length} of ${loaded} trees` + (run.left_out ? ` · ${run.left_out}` : "");
  $("rows").style.height = `${listed.length * ROW_HEIGHT}px`;
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(listed.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 8);
  $("rows").replaceChildren(...listed.slice(first, last).map((entry, i) => rowOf(entry, first + i, chosen)));
}

function rowOf({ update, index, tree }, place, chosen) {
  const isChosen = chosen && chosen.update === update && chosen.index === index;
  const row = element("div", { className: `row${isChosen ? " chosen" : ""}` });
  row.style.top = `${place * ROW_HEIGHT}px`;
  row.dataset.place = place;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", String(Boolean(isChosen)));
  const marks = element("div", { className: "marks" });
  for (const { kind, reward } of tree.rollouts.slice(0, 24)) {
    const mark = kind === "root" ? rewardMark(reward) : reward > 0.5 ? "●" : "○";
    marks.append(element("span", { className: reward > 0.5 ? "yes" : "no", text: mark }));
  }
  const roots = tree.rollouts.filter(({ kind }) => kind === "root").length;
  row.append(
    element("div", { className: "top", children: [element("b", { text: tree.task }), element("span", { text: `u${update}` })] }),
    element("div", { className: "top", children: [marks, element("span", {
      text: `${tree.kind} · ${roots}+${tree.rollouts.length - roots}` })] }),
  );
  return row;
}

function scrollToChosen(chosen) {
  const place = listed.findIndex(({ update, index }) => update === chosen.update && index === chosen.index);
  const list = $("list"), top = place * ROW_HEIGHT;
  if (place < 0) return;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}
