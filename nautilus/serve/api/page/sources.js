// Where the tokens of an answer came from: spans around the text that a draft had foretold, and what they mean.

import {make} from "./markdown.js";

const ABOUT = {
  plain: "not foretold", cache: "copied from known text", mtp: "foretold by the model's own heads",
  eagle: "foretold by a small model beside it", grammar: "all that the grammar allowed",
};

// What the runs [source, tokens, characters] of a delta add to those of a message: `tokens` by source, and for each of
// its texts [source, where it ends]. Characters are Unicode's, those of a string here are halves of some.
export function account(message, delta, runs = []) {
  message.tokens ??= {};
  message.ends ??= {content: [], reasoning_content: []};
  for (const name of ["reasoning_content", "content"]) {
    if (!delta[name]) continue;
    const chars = [...delta[name]], ends = message.ends[name];
    let end = message[name].length, from = 0;
    for (const [source, , count] of runs) {
      end += chars.slice(from, from += count).join("").length;
      if (ends.at(-1)?.[0] === source) ends.at(-1)[1] = end;
      else if (count) ends.push([source, end]);
    }
  }
  for (const [source, count] of runs) message.tokens[source] = (message.tokens[source] ?? 0) + count;
}

// For `show`: marks the text of a block that begins at a place of the text.
export const painter = (text, ends = []) => (block, at) => {
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT), nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  for (const node of nodes) {
    const begin = text.indexOf(node.data, at);
    if (begin < 0) continue;
    at = begin + node.data.length;
    node.replaceWith(...marked(text, begin, at, ends));
  }
};

function marked(text, begin, end, ends) {
  const found = [];
  for (const [source, stop] of ends) {
    if (stop <= begin) continue;
    const part = text.slice(begin, Math.min(stop, end));
    found.push(source === "plain" ? part : mark(source, part));
    begin = Math.min(stop, end);
    if (begin === end) return found;
  }
  return [...found, text.slice(begin, end)];
}

// The marks of a place say what they mean when one points at them.
export function title(place) {
  for (const span of place.querySelectorAll(".text .from:not([title])")) {
    span.title = `${span.dataset.source}: ${ABOUT[span.dataset.source] ?? ""}`;
  }
}

// Marks are in the text all the time. Whether they are seen is a class of the log, so that nothing in it is made anew,
// which would be read out again.
export function reveal(log, is) {
  log.classList.toggle("sources", is);
  if (is) title(log);
  else for (const span of log.querySelectorAll(".from[title]")) span.removeAttribute("title");
}

const mark = (source, text) => make("span", {class: "from", "data-source": source}, text);

export function legend(tokens = {}) {
  const names = [...new Set([...Object.keys(ABOUT), ...Object.keys(tokens)])].filter(name => tokens[name]);
  return names.flatMap((name, i) => [
    i ? " · " : "Tokens: ", mark(name, name), ` ${tokens[name]} (${ABOUT[name] ?? ""})`,
  ]);
}
