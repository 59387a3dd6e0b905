// The little of Markdown that models write all the time, as DOM nodes. No text ever becomes markup.

const FENCE = /^\s*(```+|~~~+)/, ITEM = /^\s*(?:([-*+])|(\d+)[.)])\s+(.*)$/, HEAD = /^#{1,6}\s+(.*)$/;

// A node with text or nodes in it, and attributes.
export function make(name, attributes = {}, ...inside) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...inside);
  return node;
}

// The blocks of a text: {kind: "p" | "pre" | "ul" | "ol" | "h3", lines, at, first}; `at` is where its line begins, of a
// fenced block the one after the fence.
export function blocksOf(text) {
  const blocks = [];
  let open = null, fence = null, at = 0, next = 0;
  const begin = (kind, lines, more = {}) => blocks.push(open = {kind, lines, at, ...more});
  for (const line of text.split("\n")) {
    [at, next] = [next, next + line.length + 1];
    const fenced = line.match(FENCE), item = line.match(ITEM), head = line.match(HEAD);
    if (fence) {
      if (fenced && line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) fence = open = null;
      else open.lines.push(line);
    } else if (fenced) {
      fence = fenced[1];
      begin("pre", [], {at: next});
    } else if (!line.trim()) {
      open = null;
    } else if (head) {
      begin("h3", [head[1]]);
      open = null;
    } else if (item) {
      const kind = item[1] ? "ul" : "ol", last = blocks.at(-1);
      if (last?.kind === kind) (open = last).lines.push(item[3]);  // a blank line between items does not part them
      else begin(kind, [item[3]], item[2] ? {first: item[2]} : {});
    } else if (open && open.kind !== "p") {
      open.lines.push(open.lines.pop() + "\n" + line);  // an item goes on
    } else if (open) {
      open.lines.push(line);
    } else {
      begin("p", [line]);
    }
  }
  return blocks;
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map(part =>
    part.length > 2 && part.startsWith("`") && part.endsWith("`") ? make("code", {}, part.slice(1, -1))
      : part.length > 4 && part.startsWith("**") && part.endsWith("**") ? make("strong", {}, part.slice(2, -2))
        : part);
}

function nodeOf({kind, lines, first}) {
  if (kind === "pre") return make("pre", {tabindex: 0}, make("code", {}, lines.join("\n")));  // scrolled by keys too
  if (kind === "p" || kind === "h3") return make(kind, {}, ...inline(lines.join("\n")));
  return make(kind, {start: first}, ...lines.map(line => make("li", {}, ...inline(line))));
}

// Show a text in a node. Blocks that are there already stay as they are, so that a growing text costs only its end.
// paint(block, at): what else is done to each new one.
export function show(node, text, paint) {
  const blocks = blocksOf(text), known = node.sources ?? [];
  const sources = blocks.map(block => JSON.stringify(block));
  let same = 0;
  while (same < sources.length && sources[same] === known[same]) same++;
  while (node.children.length > same) node.lastChild.remove();
  for (const block of blocks.slice(same)) {
    const made = nodeOf(block);
    paint?.(made, block.at);
    node.append(made);
  }
  node.sources = sources;
}
