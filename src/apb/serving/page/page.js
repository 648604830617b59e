import { events, json, onKeyNeeded, post, request, textOf } from "./client.js";
import { show } from "./reader.js";
import { count, details, legend, seconds, summary } from "./told.js";

const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

let model = null; // the server's, with `turns`: whether it takes more than one message
let file = null; // {name, text} that was chosen or dropped
let opened = null; // the document that is open: what the API says of it, its text, the turns so far
let running = null; // AbortController of the answer that is being written
let stops = []; // elements at which passages begin
let stop = -1; // the one that was shown last

// -- small things ------------------------------------------------------------------------------------------------

function trouble(error) {
  at("trouble").textContent = error ? error.message || String(error) : "";
  at("trouble").hidden = !error;
}

/** Run a handler; what goes wrong is told. */
const guarded = (handler) => async (event) => {
  trouble(null);
  try {
    await handler(event);
  } catch (error) {
    if (error.name !== "AbortError") trouble(error);
  }
};

const say = (text) => (at("told").textContent = text);

function button(text, press, label) {
  const made = document.createElement("button");
  Object.assign(made, { type: "button", textContent: text, className: "quiet", onclick: guarded(press) });
  if (label) made.setAttribute("aria-label", label);
  return made;
}

// -- the text ----------------------------------------------------------------------------------------------------

async function choose(chosen) {
  if (!chosen) return;
  file = { name: chosen.name, text: await textOf(chosen) };
  if (opened) await leave();
  at("file-name").textContent = file.name;
  at("file-size").textContent = count(file.text.length, "character");
  chosenOrPasted();
  at("question").focus();
}

function chosenOrPasted() {
  at("chosen").hidden = !file;
  at("pasting").hidden = Boolean(file);
  at("pasted").textContent = !file && at("text").value ? count(at("text").value.length, "character") : "";
}

/** The document of what was pasted or chosen, kept by the server and not read yet. */
async function kept() {
  const text = file ? file.text : at("text").value;
  if (!text.trim()) {
    at("text").focus();
    throw new Error("There is no text yet. Paste one, or choose a file.");
  }
  const name = file ? file.name : text.trim().split(/\s+/).slice(0, 8).join(" ").slice(0, 60);
  const told = await (await post("v1/documents", { text, name, read: false }, running.signal)).json();
  return { ...told, text, turns: [] };
}

function view(document) {
  opened = document;
  at("main").dataset.view = document ? "opened" : "start";
  at("start").hidden = Boolean(document);
  at("opened").hidden = at("reader").hidden = !document;
  at("question").labels[0].textContent = document && document.turns.length ? "Next question" : "Question";
  if (!document) return;
  at("name").textContent = document.name || document.id;
  at("size").textContent = `${count(document.characters, "character")}, ${count(document.tokens, "token")}`;
  at("turns").replaceChildren();
  at("legend").textContent = "What the blocks pass on will be marked here once it is read.";
  steps([]);
  show(at("shown"), document.text, {});
  at("shown").scrollTop = 0;
}

async function open(id) {
  const told = await json(`v1/documents/${id}`);
  const bytes = await (await request(`v1/documents/${id}/content`)).arrayBuffer();
  running?.abort();
  view({ ...told, text: new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes), turns: [] });
  location.hash = id;
  if (told.status === "read") await passages(null);
  at("question").focus();
}

async function leave() {
  running?.abort();
  location.hash = "";
  view(null);
  at("text").value = "";
  chosenOrPasted();
  await list();
}

// -- passages ----------------------------------------------------------------------------------------------------

async function passages(apb) {
  const document = opened;
  const found = await json(`v1/documents/${document.id}/passages`);
  if (document !== opened) return;
  at("legend").textContent = legend(apb, found);
  const same = JSON.stringify(found) === JSON.stringify(document.passages);
  document.passages = found;
  if (same) return;
  const before = at("shown").scrollTop;
  steps(show(at("shown"), document.text, found));
  at("shown").scrollTop = before;
}

function steps(found) {
  stops = found;
  stop = -1;
  at("steps").hidden = !found.length;
  at("place").textContent = found.length ? count(found.length, "passage") : "";
}

function step(by) {
  stops[stop]?.classList.remove("here");
  stop = stop < 0 && by < 0 ? stops.length - 1 : (stop + by + stops.length) % stops.length;
  stops[stop].classList.add("here");
  const box = at("shown"), inside = stops[stop].getBoundingClientRect().top - box.getBoundingClientRect().top;
  box.scrollTop += inside - box.clientHeight / 3;
  at("place").textContent = `${number.format(stop + 1)} of ${count(stops.length, "passage")}`;
}

// -- questions ---------------------------------------------------------------------------------------------------

/** Shows one question and its answer as it comes. */
class Turn {
  constructor(question) {
    const item = at("turn").content.cloneNode(true).firstElementChild;
    [this.asked, this.bar, this.answer, this.facts, this.how] =
      [".asked", ".progress", ".answer", ".facts", "details"].map((name) => item.querySelector(name));
    this.asked.textContent = question;
    this.since = performance.now();
    this.first = null;
    this.text = "";
    this.quarter = 0;
    at("turns").append(item);
    this.doing("Waiting for the server");
    item.scrollIntoView({ block: "nearest" });
  }

  get age() {
    return (performance.now() - this.since) / 1000;
  }

  doing(text) {
    this.bar.querySelector(".doing").textContent = text;
  }

  progress(comment) {
    const [, done, total] = /^read (\d+) of (\d+) tokens$/.exec(comment)?.map(Number) || [];
    if (!total) return this.doing("Waiting for other requests");
    const now = this.age;
    this.began ??= { now, done };
    this.bar.querySelector("progress").value = done / total;
    const rate = (done - this.began.done) / (now - this.began.now);
    const left = rate > 0 && now - this.began.now > 0.5 ? `, about ${seconds((total - done) / rate)} left` : "";
    this.doing(`Reading: ${number.format(done)} of ${count(total, "token")}${left}`);
    const quarter = Math.floor((4 * done) / total);
    if (quarter > this.quarter || !this.quarter) say(`Reading, ${25 * quarter} percent done`);
    this.quarter = Math.max(quarter, 0.5);
  }

  write(text) {
    this.first ??= this.age;
    this.bar.hidden = true;
    this.text += text;
    this.answer.textContent = this.text.trim();
  }

  end(apb, usage) {
    this.facts.textContent = summary(apb, this.first ?? this.age, this.age);
    for (const [name, what] of details(apb, usage)) {
      const [term, description] = ["dt", "dd"].map((tag) => document.createElement(tag));
      term.textContent = name;
      description.textContent = what;
      this.how.querySelector("dl").append(term, description);
    }
    this.how.hidden = false;
    if (!this.text.trim()) this.answer.textContent = "(The answer is empty.)";
    say(`Answer: ${this.answer.textContent}`);
  }

  fail(error) {
    this.bar.hidden = true;
    const stopped = error.name === "AbortError";
    this.facts.textContent = stopped ? `Stopped after ${seconds(this.age)}.` : error.message;
    this.facts.classList.toggle("wrong", !stopped);
    say(this.facts.textContent);
  }
}

/** What is sent: the conversation where the model takes one, else the question alone. */
function messages(question) {
  const before = model.turns
    ? opened.turns.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answer }])
    : [];
  return [...before, { role: "user", content: question }];
}

async function ask(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (running) return;
  if (!question) {
    at("question").focus();
    throw new Error("There is no question yet. Write one.");
  }
  busy(new AbortController());
  try {
    model ??= await about();
    if (!opened) {
      say("Sending the text");
      const document = await kept();
      view(document);
      location.hash = document.id;
      await list();
    }
    at("question").value = "";
    await answer(question);
  } finally {
    busy(null);
    await list();
  }
}

function busy(controller) {
  running = controller;
  const focused = document.activeElement;
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  if (focused === at("send") || focused === at("stop")) at("question").focus();
}

async function answer(question) {
  const document = opened, turn = new Turn(question);
  let apb = null, usage = null;
  try {
    const body = { document_id: document.id, messages: messages(question), stream: true, stream_options: { include_usage: true } };
    for await (const { comment, data } of events(await post("v1/chat/completions", body, running.signal))) {
      if (comment) turn.progress(comment);
      const choice = data?.choices[0];
      if (choice?.delta.content) {
        if (turn.first === null) passages(null).catch(() => {}); // known once the first word is; told again at the end
        turn.write(choice.delta.content);
      }
      apb = data?.apb || apb;
      usage = data?.usage || usage;
    }
    turn.write("");
    turn.end(apb, usage);
    document.turns.push({ question, answer: turn.text });
    at("question").labels[0].textContent = "Next question";
    if (document === opened) await passages(apb);
  } catch (error) {
    turn.fail(error);
    if (document === opened && !at("question").value) at("question").value = question;
  }
}

// -- kept texts --------------------------------------------------------------------------------------------------

async function list() {
  const documents = (await json("v1/documents")).data;
  at("kept").hidden = !documents.length;
  at("documents").replaceChildren(...documents.map(entry));
}

function entry(told) {
  const item = document.createElement("li"), name = told.name || told.id, about = document.createElement("span");
  const state = { unread: "not read yet", reading: "being read", failed: told.error }[told.status];
  about.textContent = `${count(told.tokens, "token")}, ${state || (told.question ? `read for “${told.question}”` : "read")}`;
  about.className = "muted";
  const title = button(name, () => open(told.id));
  title.className = "link";
  if (told.id === opened?.id) title.setAttribute("aria-current", "true");
  const remove = button("Delete", () => forget(remove, told), `Delete ${name}`);
  remove.onblur = () => (remove.textContent = "Delete");
  const what = document.createElement("div");
  what.append(title, about);
  item.append(what, remove);
  return item;
}

/** The first press asks, the second deletes. */
async function forget(pressed, told) {
  if (pressed.textContent === "Delete") {
    pressed.textContent = "Press again to delete";
    say(`Press again to delete ${told.name || told.id}`);
    return;
  }
  await request(`v1/documents/${told.id}`, { method: "DELETE" });
  if (opened?.id === told.id) await leave();
  else await list();
  say("Deleted");
  at(opened ? "question" : "text").focus();
}

// -- the page ----------------------------------------------------------------------------------------------------

async function about() {
  const served = (await json("v1/models")).data[0];
  at("model").textContent = served.id;
  document.title = `${served.id} · apb`;
  return served;
}

onKeyNeeded(
  (wrong) =>
    new Promise((given) => {
      const dialog = at("key");
      at("key-title").textContent = wrong ? "This key is not one of the server’s" : "This server asks for a key";
      at("key-text").value = "";
      dialog.returnValue = "";
      dialog.onclose = () => given(dialog.returnValue === "use" ? at("key-text").value.trim() : "");
      dialog.showModal();
    }),
);

at("ask").onsubmit = guarded(ask);
at("stop").onclick = () => running?.abort();
at("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
};
at("text").oninput = chosenOrPasted;
at("choose").onclick = () => at("file").click();
at("file").onchange = guarded(async () => {
  const [chosen] = at("file").files;
  at("file").value = "";
  await choose(chosen);
});
at("unchoose").onclick = () => {
  file = null;
  chosenOrPasted();
  at("text").focus();
};
at("another").onclick = guarded(async () => {
  file = null;
  await leave();
  at("text").focus();
});
at("before").onclick = () => step(-1);
at("after").onclick = () => step(1);
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = (event) => event.relatedTarget || document.body.classList.remove("dropping");
document.ondrop = guarded(async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const text = event.dataTransfer.getData("text");
  if (event.dataTransfer.files.length) await choose(event.dataTransfer.files[0]);
  else if (text) await choose(new File([text], "Dropped text"));
});
onhashchange = guarded(async () => {
  const id = location.hash.slice(1);
  if (id === (opened?.id ?? "")) return;
  if (id) await open(id);
  else await leave();
});

await guarded(async () => {
  model = await about();
  await list();
  if (location.hash.length > 1) await open(location.hash.slice(1));
})();
document.body.dataset.ready = "";
