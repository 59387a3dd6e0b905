// The server's API: requests with the key of this tab, and answers as they stream.

import {account} from "./sources.js";

export class ApiFault extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const KEY = "nautilus.key";
export const keep = key => sessionStorage.setItem(KEY, key);

export async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY), headers = key ? {Authorization: "Bearer " + key} : {};
  if (body) headers["Content-Type"] = "application/json";
  const how = body ? {method: "POST", body: JSON.stringify(body)} : {};
  let answer;
  try {
    answer = await fetch(path, {...how, headers, signal, cache: "no-store"});
  } catch (bad) {
    if (bad.name === "AbortError") throw bad;
    throw new ApiFault("the server cannot be reached");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new ApiFault(told?.error?.message ?? `the server answered ${answer.status}`, answer.status);
}

// The JSON objects of a stream of server-sent events, in order. ApiFault for an error among them, and for a stream
// that ends before it says so.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const {value, done} = await reader.read();
      if (done) break;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;  // a comment keeps the connection open
        const event = JSON.parse(data);
        if (event.error) throw new ApiFault(event.error.message);
        yield event;
      }
    }
  } catch (bad) {
    if (bad.name === "AbortError" || bad instanceof ApiFault) throw bad;
    throw new ApiFault("the connection broke off before the answer was complete");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiFault("the answer ended before it was complete");
}

// What a choice of a chunk adds to a message of the conversation.
export function extend(message, choice) {
  const delta = choice.delta ?? {content: choice.text};
  account(message, delta, choice.nautilus?.sources);
  message.content += delta.content ?? "";
  message.reasoning_content += delta.reasoning_content ?? "";
  for (const {index, id, function: part} of delta.tool_calls ?? []) {
    const call = message.tool_calls[index] ??= {id, type: "function", function: {name: "", arguments: ""}};
    call.function.name += part.name ?? "";
    call.function.arguments += part.arguments ?? "";
  }
}
