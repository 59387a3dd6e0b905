// The chat page: a conversation, what is asked with it, and the answers to it.

import {ApiFault, ask, events, extend, keep} from "./answers.js";
import {make, show} from "./markdown.js";
import {legend, painter, reveal, title} from "./sources.js";

const at = id => document.getElementById(id);
const [log, words, settings, panel, note] = ["log", "words", "settings", "panel", "note"].map(at);
const NAMES = {user: "You", assistant: "Answer", tool: "Tool result"};
const CHAT = "nautilus.chat", SETTINGS = "nautilus.settings";
const PLAIN = 256;  // tokens of an answer that no template ends, where none are asked for

let chat = [];  // messages as the API has them, answers with `status`, `error` and `done` besides; log shows one each
let running = null;  // what stops the answer that is being written
let plain = false;  // the model has no chat template

// ----- what survives a reload ----------------------------------------------------------------------------------------

function save() {
  try {
    sessionStorage.setItem(CHAT, JSON.stringify(chat));
    sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(new FormData(settings))));
  } catch {
    tell("This conversation is too long to be kept over a reload.");
  }
}

function restore() {
  chat = JSON.parse(sessionStorage.getItem(CHAT) ?? "[]");
  for (const message of chat) {
    if (message.role === "assistant" && !message.done) Object.assign(message, {done: true, status: "stopped"});
  }
  const kept = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
  for (const [name, value] of Object.entries(kept)) {
    const field = settings.elements[name];
    if (field.type === "checkbox") field.checked = true;  // those that are not are not kept
    else field.value = value;
  }
  reveal(log, settings.elements.sources.checked);
  redraw(0);
  log.scrollTop = log.scrollHeight;
}

function tell(text) {
  note.textContent = text;
  note.hidden = !text;
}

// ----- the conversation as it is shown -------------------------------------------------------------------------------

// Draw the messages from one on. The last has buttons that others have not, so it is drawn anew when another follows.
function redraw(from) {
  while (log.children.length > from) log.lastChild.remove();
  for (let i = from; i < chat.length; i++) log.append(article(chat[i], i));
}

function add(message) {
  chat.push(message);
  redraw(Math.max(0, chat.length - 2));
  log.scrollTop = log.scrollHeight;
  save();
}

function cut(length) {
  chat.length = length;
  redraw(Math.max(0, length - 1));
}

function article(message, index) {
  const node = make("article", {class: message.role}, make("h2", {}, NAMES[message.role]));
  if (message.role === "assistant") {
    fill(node, message);
    if (message.error) node.append(make("p", {class: "error", role: "alert"}, message.error));
    if (message.done && index === chat.length - 1) node.append(...results(message));
  } else {
    const text = make("div", {class: "text"});
    if (message.role === "tool") text.append(make("pre", {tabindex: 0}, message.content));
    else show(text, message.content);
    node.append(text);
  }
  if (message.role !== "assistant" || message.done) node.append(buttons(node, message, index));
  return node;
}

function buttons(node, message, index) {
  const row = make("div", {class: "buttons"}), last = index === chat.length - 1;
  const button = (name, work) => row.append(make("button", {type: "button", onclick: work}, name));
  if (message.content) button("Copy", event => copy(message.content, event.currentTarget));
  if (message.role === "user") button("Edit", () => edit(node, message, index));
  if (message.role === "assistant" && last) button(message.error ? "Retry" : "Regenerate", () => again(index));
  if (message.role !== "assistant" && last) button("Answer", () => again(index + 1));  // its answer was lost
  return row;
}

// The parts of an answer, made when there is something in them.
function fill(node, message) {
  const part = (name, build) => node.querySelector(":scope > ." + name) ?? node.appendChild(build());
  const {ends = {}, tokens} = message;
  if (message.reasoning_content) {
    const thinking = part("thinking", () => make("details", {class: "thinking", open: !message.done},
      make("summary", {}, "Thinking"), make("div", {class: "text"})));
    show(thinking.lastChild, message.reasoning_content, painter(message.reasoning_content, ends.reasoning_content));
    if ((message.content || message.tool_calls.length) && !thinking.folded) {
      thinking.open = false;  // once: who opens it again wants to read it
      thinking.folded = true;
    }
  }
  if (message.content) {
    show(part("text", () => make("div", {class: "text"})), message.content, painter(message.content, ends.content));
  }
  for (const [i, call] of message.tool_calls.entries()) {
    const card = part("call-" + i, () => make("section", {class: `call call-${i}`, "aria-label": "Tool call"},
      make("strong"), make("pre", {tabindex: 0})));
    card.firstChild.textContent = call.function.name;
    card.lastChild.textContent = pretty(call.function.arguments);
  }
  const key = part("legend", () => make("p", {class: "legend"}));
  key.replaceChildren(...legend(tokens));
  const status = part("status", () => make("p", {class: "status"}));
  status.textContent = message.status;
  node.append(key, status);  // they stay the last
  if (settings.elements.sources.checked) title(node);
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;  // it is still being written
  }
}

// Where a person plays the tools: a form for the results of the last answer's calls.
function results(message) {
  if (!message.tool_calls.length) return [];
  const fields = message.tool_calls.map(() => make("textarea", {rows: 2, required: true}));
  const send = event => {
    event.preventDefault();
    if (running) return;
    message.tool_calls.forEach((call, i) => add({role: "tool", tool_call_id: call.id, content: fields[i].value}));
    answer();
  };
  const labels = message.tool_calls.map((call, i) => make("label", {}, `Result of ${call.function.name} `, fields[i]));
  return [make("form", {class: "call", onsubmit: send}, ...labels, make("button", {type: "submit"}, "Send results"))];
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // there is no clipboard for pages that come over plain HTTP from another machine
    const field = make("textarea", {class: "unseen"});
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => button.textContent = "Copy", 1500);
}

function edit(node, message, index) {
  const field = make("textarea", {rows: 4, "aria-label": "Edited message"});
  const back = () => {
    const old = article(message, index);
    node.replaceWith(old);
    old.querySelector("button").focus();
  };
  const send = event => {
    event.preventDefault();
    if (running || !field.value.trim()) return;
    cut(index);
    add({role: "user", content: field.value});
    answer();
  };
  const keys = event => {
    if (event.key === "Escape") back();
    else if (sends(event)) send(event);
  };
  field.value = message.content;
  node.replaceChildren(make("form", {onsubmit: send, onkeydown: keys}, field, make("div", {class: "buttons"},
    make("button", {type: "submit"}, "Send"), make("button", {type: "button", onclick: back}, "Cancel"))));
  field.focus();
}

// Enter, but not the one that ends the input of a character in several keys, and not one on a button.
const sends = event =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target.tagName === "TEXTAREA";

// ----- asking --------------------------------------------------------------------------------------------------------

// What is asked of every answer: only what the panel says, as the server has defaults of its own.
function asked() {
  const body = {
    stream: true, stream_options: {include_usage: true, continuous_usage_stats: true}, return_token_sources: true,
  };
  for (const [field, name] of [["temperature", "temperature"], ["longest", "max_tokens"]]) {
    const input = settings.elements[field];
    if (!input.validity.valid) throw new ApiFault(`${name}: ${input.validationMessage}`);
    if (input.value) body[name] = input.valueAsNumber;
  }
  return body;
}

function history() {
  const system = settings.elements.system.value.trim();
  const before = chat.slice(0, -1).filter(message => message.role !== "assistant" || message.content
    || message.tool_calls.length);
  return [...(system ? [{role: "system", content: system}] : []), ...before.map(sent)];
}

function sent({role, content, reasoning_content, tool_calls, tool_call_id}) {
  const message = {role, content};
  if (reasoning_content) message.reasoning_content = reasoning_content;
  if (tool_calls?.length) message.tool_calls = tool_calls;
  if (tool_call_id) message.tool_call_id = tool_call_id;
  return message;
}

function chatBody() {
  const {thinking, effort, budget, tools} = settings.elements, body = {...asked(), messages: history()};
  if (thinking.value) body.chat_template_kwargs = {enable_thinking: thinking.value === "on"};
  if (effort.value) body.reasoning_effort = effort.value;
  if (!budget.validity.valid) throw new ApiFault(`thinking budget: ${budget.validationMessage}`);
  if (budget.value) body.thinking_token_budget = budget.valueAsNumber;
  if (tools.value.trim()) {
    try {
      body.tools = JSON.parse(tools.value);
    } catch (bad) {
      throw new ApiFault(`tools: not valid JSON: ${bad.message}`);
    }
  }
  return body;
}

// Without a template the conversation is one text that goes on.
function plainBody() {
  const join = (text, {role, content}) => text + (text && role !== "assistant" ? "\n" : "") + content;
  return {max_tokens: PLAIN, ...asked(), prompt: history().reduce(join, "")};
}

async function stream(signal) {
  if (!plain) {
    try {
      return await ask("/v1/chat/completions", chatBody(), signal);
    } catch (bad) {
      if (bad.status !== 400 || !bad.message.includes("has no chat template")) throw bad;
      plain = true;
      tell("This model has no chat template: it goes on with your text. Thinking and tools are not asked for.");
    }
  }
  return await ask("/v1/completions", plainBody(), signal);
}

// The last message becomes the answer to those before it.
async function answer() {
  const message = {role: "assistant", content: "", reasoning_content: "", tool_calls: [], status: "reading…"};
  running = new AbortController();
  add({...message, done: false});
  const current = chat.at(-1), clock = new Clock();
  busy(true);
  let drawing = 0;
  const draw = work => {
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;  // not if one has scrolled up to read
    if (chat.at(-1) === current) work();  // else a new chat has begun
    if (follows) log.scrollTop = log.scrollHeight;
    drawing = 0;
  };
  try {
    for await (const event of events(await stream(running.signal))) {
      const choice = event.choices[0];
      if (choice) extend(current, choice);
      clock.see(event, Boolean(current.content || current.reasoning_content || current.tool_calls.length));
      current.status = clock.text();
      drawing ||= requestAnimationFrame(() => draw(() => fill(log.lastChild, current)));
    }
  } catch (bad) {
    if (bad.name === "AbortError") clock.ended = "stopped";
    else current.error = bad instanceof ApiFault ? bad.message : `this page failed: ${bad.message}`;
    if (bad.status === 401) askForKey();
  }
  cancelAnimationFrame(drawing);
  current.status = clock.text();
  current.done = true;
  running = null;
  draw(() => redraw(chat.length - 1));
  busy(false);
  save();
}

// How fast an answer came, as its usage tells.
class Clock {
  began = performance.now();
  ended = "";

  see(event, something) {
    this.usage = event.usage ?? this.usage;
    const now = performance.now();
    if (!something) return;
    if (!this.first) [this.first, this.before] = [now, this.usage?.completion_tokens ?? 0];
    if (event.choices.length) this.latest = now;
    if (event.choices[0]?.finish_reason === "length") this.ended = "cut off: no tokens left for it";
  }

  text() {
    const parts = [], usage = this.usage;
    if (usage && this.first) {
      const seconds = (this.latest - this.first) / 1000, count = usage.completion_tokens - this.before;
      if (seconds > 0 && count > 0) parts.push(`${(count / seconds).toPrecision(3)} tokens/s`);
    }
    const accepted = usage?.completion_tokens_details?.accepted_prediction_tokens;
    if (accepted != null) {
      const passes = Math.max(1, usage.completion_tokens - accepted);  // each ends with a token that was not foretold
      parts.push(`${accepted} accepted from drafts`, `${(usage.completion_tokens / passes).toFixed(2)} tokens per pass`);
    }
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(`${usage.prompt_tokens} tokens in (${cached} cached)`, `${usage.completion_tokens} out`);
    }
    if (this.first) parts.push(`first token after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    if (this.ended) parts.push(this.ended);
    return parts.join(" · ");
  }
}

function again(index) {
  if (running) return;
  cut(index);
  answer();
  at("stop").focus();
}

function busy(is) {
  const left = document.activeElement === at("stop") || document.activeElement === document.body;
  log.setAttribute("aria-busy", is);  // read to those who listen when it is whole
  at("send").hidden = is;
  at("stop").hidden = !is;
  if (!is && left) words.focus();
}

// ----- the rest of the page ------------------------------------------------------------------------------------------

async function greet() {
  try {
    const {data: [model]} = await (await ask("/v1/models")).json();
    at("model").textContent = model.id;
    document.title = model.id + " – nautilus";
    tell("");
  } catch (bad) {
    if (bad.status === 401) askForKey();
    else tell(bad.message);
  }
}

function askForKey() {
  if (!at("ask").open) at("ask").showModal();
}

at("ask").addEventListener("submit", event => {
  event.preventDefault();
  keep(at("key").value.trim());
  at("key").value = "";
  at("ask").close();
  greet();
});
at("composer").addEventListener("submit", event => {
  event.preventDefault();
  const content = words.value;
  if (running || !content.trim()) return;
  words.value = "";
  add({role: "user", content});
  answer();
});
words.addEventListener("keydown", event => {
  if (!sends(event)) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", event => {
  if (event.key === "Escape") running?.abort();
});
at("fresh").addEventListener("click", () => {
  running?.abort();
  cut(0);
  save();
  words.focus();
});
settings.addEventListener("submit", event => event.preventDefault());
settings.addEventListener("change", save);
settings.elements.sources.addEventListener("change", event => reveal(log, event.target.checked));
window.addEventListener("pagehide", save);
panel.addEventListener("keydown", event => {
  if (event.key === "Escape" && !running) panel.open = false;
});

restore();
greet();
