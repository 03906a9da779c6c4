// A page that loses nothing: what it says stays in the outbox until it comes back from the server, and each new
// connection begins after the last message that the page has.

const wanted = new URLSearchParams(location.search).get("room") ?? "";
const room = /^[a-z0-9-]{1,32}$/.test(wanted) ? wanted : "lobby";

const log = document.querySelector("#log");
const status = document.querySelector("#status");
const form = document.querySelector("#composer");
const newest = document.querySelector("#newest");
const template = document.querySelector("#message");
const empty = document.querySelector("#empty");

// Seconds: the first wait before another try, the longest, and how long a server that counts us every ten may be quiet.
const FIRST_WAIT = 0.25;
const LONGEST_WAIT = 8;
const SILENCE = 25;

// Close codes that have something to say to who is reading.
const REASONS = {
  1012: "The server restarts",
  1013: "The chat is not available",
  4008: "Too far behind",
  other: "Offline",
};

let socket = null;
let ready = false;
let last = "";
let failures = 0;
let retry = 0;
let watchdog = 0;

const shown = new Set(); // keys of the messages that are on the page
const outbox = new Map(); // key -> what was said, until it comes back
const waiting = new Map(); // key -> its place on the page until then

// -- the connection --

function connect() {
  clearTimeout(retry);
  const url = new URL(`rooms/${room}?after=${last}`, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(url);
  socket.addEventListener("message", hear);
  socket.addEventListener("close", lose);
  listenForSilence();
}

function hear(event) {
  listenForSilence();
  const { messages = [], ready: caughtUp, here } = JSON.parse(event.data);
  if (messages.length) show(messages);
  if (caughtUp) {
    ready = true;
    failures = 0;
    say("online", "Online");
    empty.hidden = log.children.length > 0;
    for (const said of outbox.values()) socket.send(JSON.stringify(said));
  }
  if (here && ready) say("online", here === 1 ? "Only you here" : `${here} here`);
}

function lose(event) {
  ready = false;
  clearTimeout(watchdog);
  if (event.code === 1007 || event.code === 1009) outbox.clear(); // it will not be taken the next time either
  // Twice as long each time, and not all pages at once: a server that comes back is not to be overrun.
  const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** failures) * (0.5 + Math.random());
  failures += 1;
  // The same words each time: a screen reader says them once.
  say("connecting", `${REASONS[event.code] ?? REASONS.other}, connecting…`);
  retry = setTimeout(connect, wait * 1000);
}

// A connection may be gone without anybody having said so.
function listenForSilence() {
  clearTimeout(watchdog);
  const watched = socket;
  watchdog = setTimeout(() => {
    watched.removeEventListener("close", lose);
    watched.removeEventListener("message", hear);
    watched.close();
    lose({});
  }, SILENCE * 1000);
}

function say(state, text) {
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

window.addEventListener("online", () => {
  if (socket.readyState === WebSocket.CLOSED) connect();
});

// -- what is on the page --

function show(messages) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  let news = false;
  for (const { id, name, text, key } of messages) {
    last = id;
    if (shown.has(key)) continue; // said twice, because the first time was not heard of
    shown.add(key);
    outbox.delete(key);
    waiting.get(key)?.remove();
    waiting.delete(key);
    add(name, text, Number.parseInt(id, 10));
    news = true;
  }
  log.append(...waiting.values());
  group();
  empty.hidden = true;
  if (atEnd) toEnd();
  else newest.hidden = !news;
}

function add(name, text, when) {
  const item = template.content.firstElementChild.cloneNode(true);
  const mine = name === form.elements.name.value.trim();
  item.classList.toggle("mine", mine);
  item.dataset.name = name;
  item.style.setProperty("--hue", hue(name));
  item.querySelector(".face").textContent = initials(name);
  item.querySelector("b").textContent = name;
  item.querySelector(".text").textContent = text;
  const time = item.querySelector("time");
  const date = new Date(when);
  time.dateTime = date.toISOString();
  const today = date.toDateString() === new Date().toDateString();
  time.textContent = date.toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
  log.append(item);
  return item;
}

// Who says several things in a row is named once.
function group() {
  let before = "";
  for (const item of log.children) {
    item.classList.toggle("again", item.dataset.name === before);
    before = item.dataset.name;
  }
}

function hue(name) {
  let sum = 0;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

function initials(name) {
  const words = name.trim().split(/\s+/);
  return words.slice(0, 2).map((word) => [...word][0].toUpperCase()).join("");
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
  newest.hidden = true;
}

log.addEventListener("scroll", () => {
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 40) newest.hidden = true;
});
newest.addEventListener("click", toEnd);

// -- what is said here --

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const name = form.elements.name.value.trim();
  const text = form.elements.text.value.trim();
  if (!name || !text) return;
  localStorage.setItem("name", name);
  const said = { name, text, key: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
  outbox.set(said.key, said);
  const item = add(name, text, Date.now());
  item.classList.add("mine", "pending");
  waiting.set(said.key, item);
  group();
  empty.hidden = true;
  toEnd();
  if (ready) socket.send(JSON.stringify(said));
  form.elements.text.value = "";
  form.elements.text.focus();
});

// Enter sends, Shift+Enter begins a line.
form.elements.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.querySelector("#room").textContent = room;
document.title = `#${room}`;
form.elements.name.value = localStorage.getItem("name") ?? "";
(form.elements.name.value ? form.elements.text : form.elements.name).focus();
connect();
