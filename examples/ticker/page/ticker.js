// Draws the newest state there is, and says which it was: the server sends no more than a few ahead of that.

const canvas = document.querySelector("canvas");
const context = canvas.getContext("2d");
const slow = document.querySelector("#slow");
const place = (id, text) => { document.querySelector(id).textContent = text; };

let socket = null;
let failures = 0;
let shape = null; // the box and its balls, told once
let before = null; // the two newest frames; what is drawn is between them
let now = null;
let received = 0; // frames on this connection
let answered = 0; // how many of them the server knows to be drawn
let skipped = 0;
let counted = 0;
let drawnAt = 0;

function connect() {
  const url = new URL("state", location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  received = answered = 0;
  before = now = null;
  socket.addEventListener("message", ({ data }) => {
    if (typeof data === "string") {
      shape = JSON.parse(data);
      failures = 0;
      canvas.height = canvas.width * shape.height / shape.width;
      place("#status", "live");
    } else {
      hear(new DataView(data));
    }
  });
  socket.addEventListener("close", () => {
    const wait = Math.min(15, 0.25 * 2 ** failures) * (0.5 + Math.random());
    failures += 1;
    place("#status", "connecting…");
    setTimeout(connect, wait * 1000);
  });
}

// Number and watchers, then x and y of each ball as parts of 65535 of the box.
function hear(view) {
  const frame = { number: view.getUint32(0), at: performance.now(), x: [], y: [] };
  place("#watchers", view.getUint16(4));
  for (let at = 6; at < view.byteLength; at += 4) {
    frame.x.push(view.getUint16(at) / 65535);
    frame.y.push(view.getUint16(at + 2) / 65535);
  }
  received += 1;
  counted += 1;
  if (now) skipped += frame.number - now.number - 1;
  before = now ?? frame;
  now = frame;
}

function draw(time) {
  requestAnimationFrame(draw);
  if (!now || (slow.checked && time - drawnAt < 500)) return;
  drawnAt = time;
  if (answered !== received && socket.readyState === WebSocket.OPEN) {
    // Being slow is to take in less than there is: one frame at a time, not all that have come.
    answered = slow.checked ? answered + 1 : received;
    socket.send(JSON.stringify({ drawn: answered }));
  }
  // One frame behind, so that there is always somewhere to go.
  const part = Math.min(1, (performance.now() - now.at) * shape.rate / 1000);
  const between = (from, to) => from + (to - from) * part;
  context.clearRect(0, 0, canvas.width, canvas.height);
  shape.radii.forEach((radius, index) => {
    const x = between(before.x[index], now.x[index]) * canvas.width;
    const y = between(before.y[index], now.y[index]) * canvas.height;
    context.beginPath();
    context.arc(x, y, radius / shape.width * canvas.width, 0, 2 * Math.PI);
    context.fillStyle = `hsl(${190 + index * 67 % 150} 60% 55%)`;
    context.fill();
  });
}

function poke(x, y) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ poke: [x, y] }));
}

canvas.addEventListener("pointerdown", (event) => {
  const box = canvas.getBoundingClientRect();
  poke((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
});
canvas.addEventListener("keydown", (event) => {
  if (event.key === "Enter") poke(0.5, 0.5);
});

setInterval(() => {
  place("#rate", counted);
  place("#skipped", skipped);
  counted = 0;
}, 1000);

connect();
requestAnimationFrame(draw);
