"use strict";
// The conversations are kept here, one list of messages a model. Text is only ever written as text, never as HTML.
const $ = (id) => document.getElementById(id);
const VALUES = ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed"];
let models = [], turns = [], running = null, tries = 0;

function add(parent, kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text || "";
  parent.append(element);
  return element;
}

function values() {
  const given = {};
  for (const name of VALUES) if ($(name).value.trim() !== "") given[name] = Number($(name).value);
  if (given.seed !== undefined) given.seed += tries;
  return given;
}

function messages(model) {
  const system = $("system").value.trim();
  return [...(system ? [{role: "system", content: system}] : []), ...turns[model]];
}

function stay(action) {  // at the end of the page, if the reader is there
  const talk = $("talk"), atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  action();
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

async function* lines(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, {stream: true});
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
    if (done && rest) yield JSON.parse(rest);
    if (done) return;
  }
}

async function answer(model, box, signal) {
  const said = add(box, "said open"), note = add(box, "note");
  let text = "", whole = false;
  try {
    const response = await fetch("/answer", {method: "POST", signal, headers: {"Content-Type": "application/json"},
      body: JSON.stringify({model, messages: messages(model), values: values()})});
    for await (const part of lines(response)) {
      if (part.error) throw new Error(part.error);
      stay(() => {
        if (part.more !== undefined) said.textContent = text += part.more;
        if (part.end !== undefined) {
          said.textContent = text = part.text;
          whole = true;
          const remarks = [];
          if (part.end === "length") remarks.push(`ends at ${part.tokens} tokens: see Settings, Longest answer`);
          if (part.dropped) remarks.push(`the first ${part.dropped} messages were not read: the conversation is longer than the model's context`);
          note.textContent = remarks.join("; ");
        }
      });
    }
    if (!whole) throw new Error("the connection has ended: is megatron-ft chat still running?");
  } catch (error) {
    if (signal.aborted) note.textContent = "stopped";
    else { note.className = "note wrong"; note.textContent = error.message; return false; }
  } finally {
    said.classList.remove("open");
  }
  turns[model].push({role: "assistant", content: text});
  return true;
}

async function ask(text) {
  $("hint")?.remove();
  const turn = add($("talk"), "turn");
  add(turn, "user", text);
  const answers = add(turn, models.length > 1 ? "answers two" : "answers one");
  running = new AbortController();
  busy(true);
  for (const list of turns) list.push({role: "user", content: text});
  const boxes = models.map((name) => {
    const box = add(answers, "answer");
    if (models.length > 1) add(box, "name", name);
    return box;
  });
  $("talk").scrollTop = $("talk").scrollHeight;
  for (let model = 0; model < models.length; model++) {
    if (running.signal.aborted) {  // stopped before this model's turn: the roles still alternate
      turns[model].push({role: "assistant", content: ""});
      add(boxes[model], "note", "not asked");
      continue;
    }
    if (await answer(model, boxes[model], running.signal)) continue;
    turn.classList.add("failed");
    takeBack();  // a question that failed is asked again as a whole
    $("text").value = $("text").value || text;
    break;
  }
  running = null;
  busy(false);
}

function takeBack() {
  let question = null;
  for (const list of turns) {
    const last = list.map((message) => message.role).lastIndexOf("user");
    if (last >= 0) question = list.splice(last)[0].content;
  }
  return question;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("new").disabled = on;
  $("retry").disabled = on || !turns[0].length;
  $("save").disabled = on || !turns[0].length;
  if (!on) $("text").focus();
}

function fit() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function send(event) {
  event?.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  fit();
  tries = 0;
  ask(text);
}

function retry() {
  if (running) return;
  const question = takeBack();
  if (question === null) return;
  tries += 1;
  document.querySelectorAll(".failed").forEach((turn) => turn.remove());
  $("talk").lastElementChild?.remove();
  ask(question);
}

function save() {
  const text = models.map((model, i) => JSON.stringify({messages: messages(i), model}) + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = "chat.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function clear() {
  turns = models.map(() => []);
  $("talk").replaceChildren();
  busy(false);
}

async function start() {
  const about = await (await fetch("/about")).json();
  models = about.models;
  turns = models.map(() => []);
  $("names").textContent = models.join(" | ");
  document.title = `${models.join(" | ")} - chat`;
  $("system").value = about.system;
  for (const name of VALUES) $(name).value = about.values[name];
  $("form").addEventListener("submit", send);
  $("text").addEventListener("input", fit);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("retry").addEventListener("click", retry);
  $("new").addEventListener("click", clear);
  $("save").addEventListener("click", save);
  busy(false);
}

start();
