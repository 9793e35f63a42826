import { EXAMPLES } from "./examples.js";
import { curl, headersFor, makeBody, python, send, userMessage } from "./request.js";

const $ = (id) => document.getElementById(id);
const GLYPHS = {
  text: '<svg viewBox="0 0 24 24"><path d="M5 7h14M5 12h14M5 17h8"/></svg>',
  audio: '<svg viewBox="0 0 24 24"><path d="M4 10v4m4-7v10m4-13v16m4-12v8m4-6v4"/></svg>',
};
const MAX_BODY = 48 * 2 ** 20;

let model = { id: "nano", input_modalities: ["text"] };
let messages = []; // the conversation as it is sent
let files = []; // attached to the next message: {kind, name, url}
let running = null; // the AbortController of the answer under way
let language = "curl";

/** An element with properties and children. */
function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------- options and code

function options() {
  const number = (id) => ($(id).value === "" || !Number.isInteger($(id).valueAsNumber) ? null : $(id).valueAsNumber);
  return {
    thinking: $("thinking").checked,
    temperature: $("temperature").valueAsNumber,
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    system: $("system").value.trim(),
  };
}

function currentBody() {
  const text = $("text").value.trim();
  const next = text || files.length || !messages.length ? [userMessage(text || "Hello", files)] : [];
  return makeBody(model.id, next.length ? [...messages, ...next] : messages.slice(0, -1), options());
}

function code(short) {
  return (language === "curl" ? curl : python)(location.origin, currentBody(), !$("key-field").hidden, short);
}

function refresh() {
  $("temperature-value").textContent = $("temperature").valueAsNumber.toFixed(2);
  $("code").textContent = code(true);
  $("send").disabled = !$("text").value.trim() && !files.length;
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
  const kept = { ...options(), max_tokens: $("max_tokens").value, seed: $("seed").value };
  try { localStorage.setItem("fourfold", JSON.stringify(kept)); } catch { /* storage is off */ }
}

function restore() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("fourfold") ?? "{}"); } catch { /* storage is off */ }
  for (const id of ["temperature", "max_tokens", "seed", "system"]) if (kept[id] != null) $(id).value = kept[id];
  $("thinking").checked = kept.thinking ?? false;
}

// ---------------------------------------------------------------- media

function preview({ kind, name, url }) {
  if (kind === "audio") return el("audio", { src: url, controls: true, title: name });
  if (kind === "video" && !url.startsWith("data:image/")) {
    return el("video", { src: url, controls: true, muted: true, loop: true, playsInline: true, title: name });
  }
  return el("img", { src: url, alt: name, title: name });
}

function showFiles() {
  $("attached").replaceChildren(...files.map((file) => {
    const chip = el("li", { className: `chip c-${file.kind}` }, preview(file), el("span", { className: "name", textContent: file.name }));
    if (/^data:image\/(gif|webp)/.test(file.url)) {
      const other = file.kind === "image" ? "video" : "image";
      const swap = el("button", { type: "button", textContent: `as ${other}`, title: `Send this animation as ${other}` });
      swap.onclick = () => { file.kind = other; showFiles(); };
      chip.append(swap);
    }
    const remove = el("button", { type: "button", textContent: "✕", title: "Remove" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.onclick = () => { files = files.filter((f) => f !== file); showFiles(); $("text").focus(); };
    chip.append(remove);
    return chip;
  }));
  refresh();
}

async function attach(list) {
  for (const file of list) {
    const kind = file.type.split("/")[0];
    if (!["image", "video", "audio"].includes(kind)) fail(`${file.name}: attach images, videos or sounds.`);
    else if (!model.input_modalities.includes(kind)) fail(`${file.name}: ${model.id} takes no ${kind}.`);
    else {
      const url = await new Promise((resolve, reject) => {
        const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: () => reject(reader.error) });
        reader.readAsDataURL(file);
      });
      if (files.reduce((sum, f) => sum + f.url.length, url.length) > MAX_BODY - 2 ** 20) fail(`${file.name}: together the files are larger than the server takes (48 MiB).`);
      else files.push({ kind, name: file.name, url });
    }
  }
  showFiles();
  $("text").focus();
}

// ---------------------------------------------------------------- conversation

function nearEnd() {
  return $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
}

function toEnd() {
  $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: "instant" });
}

function fail(message) {
  $("welcome").hidden = true;
  $("log").append(el("li", { className: "turn" }, el("div", { className: "failure", role: "alert", textContent: message })));
  toEnd();
}

function showUser(text, attached) {
  $("welcome").hidden = true;
  const turn = el("li", { className: "turn user" });
  if (attached.length) turn.append(el("div", { className: "media" }, ...attached.map(preview)));
  if (text) turn.append(el("div", { className: "said", textContent: text }));
  $("log").append(turn);
}

/** What was counted: modalities of the prompt, cache hits and misses, the answer; and a bar of the same. */
function showUsage(usage, seconds, reason) {
  const prompt = usage.prompt_tokens_details;
  const media = ["image", "video", "audio"].filter((kind) => prompt[`${kind}_tokens`]).map((kind) => `${prompt[`${kind}_tokens`]} ${kind}`);
  const thought = usage.completion_tokens_details.reasoning_tokens;
  const line = [
    `${usage.prompt_tokens} prompt tokens${media.length ? ` (${media.join(", ")})` : ""}`,
    `cache: ${usage.prompt_cache_hit_tokens} hit, ${usage.prompt_cache_miss_tokens} miss`,
    `${usage.completion_tokens} answer tokens${thought ? ` (${thought} thinking)` : ""}`,
    `${seconds.toFixed(1)} s`,
    ...(reason === "length" ? ["cut off at max tokens"] : []),
  ].join(" · ");
  const meter = el("span", { className: "meter" });
  meter.setAttribute("aria-hidden", "true");
  const bar = (n, className) => n && meter.append(Object.assign(el("i", { className }), { style: `flex-grow: ${n}` }));
  bar(usage.prompt_cache_hit_tokens, "hit c-text");
  bar(usage.prompt_cache_miss_tokens, "c-text");
  bar(usage.completion_tokens, "out");
  return el("div", { className: "usage" }, meter, el("span", { className: "counts", textContent: line }));
}

async function answer() {
  const turn = el("li", { className: "turn assistant busy" });
  const said = el("div", { className: "said" });
  const thought = el("div", { className: "thought" });
  turn.append(said);
  $("log").append(turn);
  toEnd();

  const started = performance.now();
  const reply = { role: "assistant", content: "" };
  let reasoning = "", reason = "", usage = null;
  const talk = messages; // "New chat" puts another in its place
  const control = new AbortController();
  setRunning(control);
  try {
    for await (const event of send(makeBody(model.id, talk, options()), $("key").value, control.signal)) {
      const follow = nearEnd();
      usage = event.usage ?? usage;
      const { delta = {}, finish_reason } = event.choices[0] ?? {};
      reason = finish_reason ?? reason;
      if (delta.reasoning_content) {
        if (!reasoning) turn.prepend(el("details", { className: "reasoning", open: true }, el("summary", { textContent: "Thinking" }), thought));
        reasoning += delta.reasoning_content;
        thought.textContent = reasoning;
      }
      if (delta.content) {
        reply.content += delta.content;
        said.textContent = reply.content;
      }
      if (follow) toEnd();
    }
  } catch (error) {
    if (error.name === "AbortError") turn.append(el("div", { className: "usage", textContent: "Stopped." }));
    else turn.append(el("div", { className: "failure", role: "alert", textContent: error.message }));
  }
  if (running === control) setRunning(null);
  turn.classList.remove("busy");
  if (reply.content || usage) talk.push(reply);
  else talk.pop(); // the question stays on the page, but is not asked again with the next one
  if (usage) {
    if (!reply.content) said.textContent = "(an empty answer)";
    turn.append(showUsage(usage, (performance.now() - started) / 1000, reason));
  }
  toEnd();
  refresh();
}

function setRunning(control) {
  running = control;
  $("send").hidden = Boolean(control);
  $("stop").hidden = !control;
}

async function ask() {
  const text = $("text").value.trim();
  if (running || (!text && !files.length)) return;
  messages.push(userMessage(text, files));
  showUser(text, files);
  $("text").value = "";
  files = [];
  showFiles();
  await answer();
}

function fresh() {
  running?.abort();
  setRunning(null);
  messages = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  document.body.classList.remove("settings");
  refresh();
  $("text").focus();
}

function showExamples() {
  const usable = EXAMPLES.map((example) => ({ ...example, files: (example.media ?? []).map((make) => make()) }))
    .filter((example) => example.files.every((file) => model.input_modalities.includes(file.kind)));
  $("examples").replaceChildren(...usable.map((example) => {
    const file = example.files[0];
    const kind = file?.kind ?? "text";
    const icon = file && kind !== "audio" ? el("img", { src: file.url, alt: "" }) : el("div", { className: `glyph c-${kind}`, innerHTML: GLYPHS[kind] });
    const caption = el("small", { textContent: example.thinking ? "text, thinking" : kind });
    const button = el("button", { type: "button", className: "example" }, icon, el("span", {}, example.label ?? example.text, caption));
    button.onclick = () => {
      fresh();
      $("thinking").checked = Boolean(example.thinking);
      $("text").value = example.text;
      files = [...example.files];
      ask();
    };
    return el("li", {}, button);
  }));
}

// ---------------------------------------------------------------- start

async function connect() {
  const response = await fetch("/v1/models", { headers: headersFor($("key").value) }).catch(() => null);
  if (response?.status === 401) {
    $("key-field").hidden = false;
    document.body.classList.add("settings");
    $("model").textContent = "needs an API key";
    $("key").focus();
    return;
  }
  if (!response?.ok) {
    $("model").textContent = "not reachable";
    $("model").classList.add("bad");
    return;
  }
  model = (await response.json()).data[0];
  const context = `\u00a0· ${model.context_window.toLocaleString("en")} tokens`;
  $("model").replaceChildren(model.id, el("span", { className: "context", textContent: context }));
  $("model").classList.remove("bad");
  document.body.classList.remove("settings");
  showExamples();
  refresh();
}

function listen() {
  $("composer").onsubmit = (event) => { event.preventDefault(); ask(); };
  $("options").onsubmit = (event) => event.preventDefault();
  $("text").oninput = refresh;
  $("options").oninput = refresh;
  $("key").onchange = connect;
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  };
  $("text").onpaste = (event) => {
    if (event.clipboardData.files.length) { event.preventDefault(); attach([...event.clipboardData.files]); }
  };
  $("stop").onclick = () => running?.abort();
  $("fresh").onclick = fresh;
  $("toggle").onclick = () => $("toggle").setAttribute("aria-expanded", document.body.classList.toggle("settings"));
  $("attach").onclick = () => $("files").click();
  $("files").onchange = async () => { await attach([...$("files").files]); $("files").value = ""; };
  document.onkeydown = (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); $("text").focus(); }
  };

  let depth = 0; // dragenter and dragleave fire for every child
  const over = (change) => { depth = change ? depth + change : 0; $("drop").hidden = depth < 1; };
  document.ondragenter = (event) => { if (event.dataTransfer.types.includes("Files")) over(1); };
  document.ondragleave = () => over(-1);
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => { event.preventDefault(); over(0); attach([...event.dataTransfer.files]); };

  const tabs = [$("tab-curl"), $("tab-python")];
  tabs.forEach((tab, index) => {
    tab.onclick = () => {
      language = tab.id.slice("tab-".length);
      for (const t of tabs) t.setAttribute("aria-selected", t === tab);
      refresh();
    };
    tab.onkeydown = (event) => {
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") { tabs[1 - index].focus(); tabs[1 - index].click(); }
    };
  });
  $("copy").onclick = async () => {
    try { await navigator.clipboard.writeText(code(false)); $("copy").textContent = "Copied"; }
    catch { $("copy").textContent = "Not allowed"; }
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  };
}

restore();
listen();
refresh();
connect();
