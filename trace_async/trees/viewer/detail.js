// The chosen turn: its figures, why budget was spent there, its tokens, and the rollout up to it.

const SHOWN_TURNS = 60; // of a longer rollout, those around the chosen turn

function nameOf(tree, index) {
  if (index === 0) return "prompt";
  const { turn, rollout, context } = tree.nodes[index];
  if (context) return `another conversation of rollout ${rollout}`;
  return `turn ${turn}, ${tree.rollouts[rollout].kind === "root" ? "rollout" : "continuation"} ${rollout}`;
}

function showDetail(tree, index, onChoose) {
  const node = tree.nodes[index], about = element("div"), turns = element("div");
  about.id = "about-turn";
  turns.id = "turns";
  about.append(element("div", { children: [element("h2", { text: nameOf(tree, index) }), factsOf(tree, index)] }));
  if (node.why) about.append(element("div", { className: "why", text: node.why }));
  const path = pathTo(tree, index), leafPath = path.concat(restOf(tree, index));
  const first = Math.max(0, path.length - SHOWN_TURNS / 2), left = leafPath.length - first - SHOWN_TURNS;
  if (first) turns.append(element("div", { className: "empty", text: `${first} earlier turns` }));
  for (const at of leafPath.slice(first, first + SHOWN_TURNS)) turns.append(turnOf(tree, at, at === index, onChoose));
  if (left > 0) turns.append(element("div", { className: "empty", text: `${left} later turns` }));
  $("detail").replaceChildren(about, turns);
  turns.querySelector(".here").scrollIntoView({ block: "nearest" });
}

// From a turn on along its own rollout to that one's end.
function restOf(tree, index) {
  const { children } = layoutOf(tree), rest = [];
  let at = index;
  for (;;) {
    const rollout = at === 0 ? 0 : tree.nodes[at].rollout;
    const following = children[at].find((child) => tree.nodes[child].rollout === rollout);
    if (following === undefined) return rest;
    rest.push(following);
    at = following;
  }
}

function factsOf(tree, index) {
  const node = tree.nodes[index], list = element("dl", { className: "facts" });
  const fact = (name, value) => list.append(element("dt", { text: name }), element("dd", { text: value }));
  fact("V before → after", `${show(node.value)} → ${show(node.after)}`);
  fact("leaves that succeeded", `${node.succeeded} of ${node.leaves}`);
  if (node.credit !== null) fact("advantage per token", signed(node.credit));
  if (node.tokens.length) {
    const mean = node.logprobs.reduce((sum, value) => sum + value, 0) / node.logprobs.length;
    fact("generated tokens", `${node.tokens.length}, mean log p ${mean.toFixed(2)}`);
    fact("policy versions", [...new Set(node.versions.map(([, version]) => version))].join(", "));
  }
  if (node.prompt_tokens) {
    fact("prefill from cache", `${node.cached_tokens} of ${node.prompt_tokens} tokens, `
      + `${Math.round(100 * node.cached_tokens / node.prompt_tokens)} %`);
  }
  if (node.reward !== null) {
    fact("reward", `${rewardMark(node.reward)} ${figure(node.reward)}`);
    for (const [name, value] of Object.entries(tree.rollouts[node.rollout].metrics)) fact(name, figure(value));
  }
  if (index === 0) {
    fact("allocated", `${tree.roots_allocated} roots, ${tree.continuations_allocated} continuations`);
    fact("tokens", `${tree.generated_tokens} generated, ${tree.unique_tokens} in the tree`);
    fact("policy at its start", `version ${tree.version_started}`);
    for (const [kind, count] of Object.entries(tree.failures)) fact(`lost: ${kind}`, String(count));
    for (const [name, what] of Object.entries(tree.faults)) fact(`broke down: ${name}`, what);
  }
  return list;
}

function turnOf(tree, index, isHere, onChoose) {
  const node = tree.nodes[index], turn = element("div", { className: `turn${isHere ? " here" : ""}` });
  const head = element("div", { className: "head", children: [element("b", { text: nameOf(tree, index) })] });
  if (node.value !== null) head.append(element("span", { text: `V ${show(node.value)}` }));
  if (node.credit !== null) head.append(element("span", { text: signed(node.credit) }));
  if (node.reward !== null) {
    head.append(element("span", { className: node.reward > 0.5 ? "yes" : "no",
      text: `${rewardMark(node.reward)} reward ${figure(node.reward)}` }));
  }
  turn.append(head);
  if (node.tokens.length) turn.append(tokensOf(node));
  if (node.seen.trim()) turn.append(element("pre", { className: "seen", text: node.seen.trim() }));
  turn.addEventListener("click", () => { if (!String(getSelection())) onChoose(index); });
  return turn;
}

// Shade: advantage (blue raises, orange lowers). Line below: how surprising the token was.
function tokensOf(node) {
  const block = element("pre");
  const strength = node.credit ? Math.min(0.45, 0.08 + Math.abs(node.credit) * 0.6) : 0;
  node.tokens.forEach((text, i) => {
    const [, version] = node.versions.findLast(([start]) => start <= i) ?? [0, "?"];
    const token = element("span", { className: "token", text,
      title: `log p ${node.logprobs[i].toFixed(3)} · advantage ${show(node.credit, 3)} · policy version ${version}` });
    if (strength) token.style.background = `rgba(var(--${node.credit > 0 ? "plus" : "minus"}), ${strength})`;
    const surprise = Math.min(1, -node.logprobs[i] / 4);
    if (surprise > 0.05) token.style.borderBottomColor = `rgba(var(--minus), ${surprise})`;
    block.append(token);
  });
  return block;
}

function showHead(tree, chosen, onChoose) {
  $("tree-summary").textContent = tree.summary;
  $("rollouts").replaceChildren(...tree.rollouts.slice(0, 200).map((rollout, number) => {
    const button = element("button", { className: rollout.kind, text: `${rewardMark(rollout.reward)} ${number}`,
      title: `${rollout.kind} ${number}: reward ${figure(rollout.reward)}` });
    button.classList.add(rollout.reward > 0.5 ? "yes" : "no");
    button.setAttribute("aria-pressed", String(rollout.leaf === chosen));
    button.addEventListener("click", () => onChoose(rollout.leaf));
    return button;
  }));
}
