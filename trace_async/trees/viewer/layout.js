// Where each node of a tree stands: depth from left to right, one row for each leaf. Made once for a tree.

const COLUMN = 58, ROW = 26;
const layouts = new WeakMap();

function layoutOf(tree) {
  if (!layouts.has(tree)) layouts.set(tree, makeLayout(tree));
  return layouts.get(tree);
}

function makeLayout(tree) {
  const count = tree.nodes.length;
  const children = Array.from({ length: count }, () => []);
  for (let i = 1; i < count; i += 1) children[tree.nodes[i].parent].push(i);
  const x = new Float64Array(count), y = new Float64Array(count);
  const order = [], stack = [0];
  while (stack.length) {
    const node = stack.pop();
    order.push(node);
    for (let i = children[node].length - 1; i >= 0; i -= 1) stack.push(children[node][i]);
  }
  let rows = 0;
  for (const node of order) {
    x[node] = tree.nodes[node].depth * COLUMN;
    if (!children[node].length) { y[node] = rows * ROW; rows += 1; }
  }
  for (const node of order.reverse()) {
    const below = children[node];
    if (below.length) y[node] = (y[below[0]] + y[below[below.length - 1]]) / 2;
  }
  order.reverse();
  // By column, the nodes from top to bottom: what lies under the pointer and what is in sight are found in it.
  const columns = [];
  for (const node of order) (columns[tree.nodes[node].depth] ??= []).push(node);
  for (const column of columns) column.sort((a, b) => y[a] - y[b]);
  return { children, x, y, columns, order, width: (columns.length - 1) * COLUMN, height: Math.max(0, rows - 1) * ROW };
}

// The nodes of `column` whose y lies in [top, bottom].
function inSight(layout, column, top, bottom) {
  const nodes = layout.columns[column] ?? [];
  let low = 0, high = nodes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (layout.y[nodes[middle]] < top) low = middle + 1; else high = middle;
  }
  let end = low;
  while (end < nodes.length && layout.y[nodes[end]] <= bottom) end += 1;
  return nodes.slice(low, end);
}

function pathTo(tree, node) {
  const path = [];
  for (let at = node; at >= 0; at = tree.nodes[at].parent) path.push(at);
  return path.reverse();
}

// Orange (0) through near-white (½) to blue (1): told apart with every kind of colour blindness.
function valueColour(value) {
  if (value === null) return "#b8bfca";
  const low = [224, 130, 20], middle = [247, 244, 238], high = [33, 102, 172];
  const share = Math.min(1, Math.max(0, value));
  const [start, end, part] = share < 0.5 ? [low, middle, share * 2] : [middle, high, share * 2 - 1];
  return `rgb(${start.map((a, i) => Math.round(a + (end[i] - a) * part)).join(",")})`;
}
