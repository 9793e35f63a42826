// The protocol: request bodies, code that sends them, and the stream of an answer.

const FORMATS = { "audio/mpeg": "mp3", "audio/mp3": "mp3", "audio/flac": "flac", "audio/x-flac": "flac", "audio/ogg": "ogg", "audio/webm": "webm", "audio/mp4": "m4a", "audio/x-m4a": "m4a", "video/mp4": "mp4", "video/webm": "webm" };

/** One attached file {kind, name, url} as a content part. */
function part({ kind, url }) {
  if (kind === "image") return { type: "image_url", image_url: { url } };
  if (kind === "video") return { type: "video_url", video_url: { url } };
  const [head, data] = url.split(",");
  return { type: "input_audio", input_audio: { data, format: FORMATS[head.slice(5).split(";")[0]] ?? "wav" } };
}

export function userMessage(text, files) {
  return { role: "user", content: files.length ? [...files.map(part), ...(text ? [{ type: "text", text }] : [])] : text };
}

/** The body that asks for an answer to `messages`. */
export function makeBody(model, messages, options) {
  const system = options.system ? [{ role: "system", content: options.system }] : [];
  const body = { model, messages: [...system, ...messages], temperature: options.temperature };
  if (options.max_tokens) body.max_tokens = options.max_tokens;
  if (options.seed !== null) body.seed = options.seed;
  if (options.thinking) body.thinking = { type: "enabled" };
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

const shorten = (text) => (text.length > 96 ? `${text.slice(0, 60)}…${text.slice(-8)}` : text);
const isData = (key, value) => (key === "url" && String(value).startsWith("data:")) || key === "data";

export function curl(origin, body, hasKey, short) {
  const json = JSON.stringify(body, (key, value) => (short && isData(key, value) ? shorten(value) : value), 2);
  const key = hasKey ? `  -H "Authorization: Bearer $FOURFOLD_API_KEY" \\\n` : "";
  return `curl -N ${origin}/v1/chat/completions \\\n  -H "Content-Type: application/json" \\\n${key}  -d @- <<'END'\n${json}\nEND\n`;
}

export function python(origin, body, hasKey, short) {
  const { thinking, stream, stream_options, ...standard } = body;
  const literal = (value, indent) => {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (Array.isArray(value)) return value.length ? `[\n${value.map((v) => indent + "    " + literal(v, indent + "    ")).join(",\n")},\n${indent}]` : "[]";
    if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `"${k}": ${literal(short && isData(k, v) ? shorten(v) : v, indent)}`).join(", ")}}`;
    return JSON.stringify(value);
  };
  const extra = thinking ? `    extra_body={"thinking": ${literal(thinking, "    ")}},\n` : "";
  const fields = Object.entries(standard).map(([k, v]) => `    ${k}=${literal(v, "    ")},\n`).join("");
  const key = hasKey ? `os.environ["FOURFOLD_API_KEY"]` : `"none"`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
stream = client.chat.completions.create(
${fields}${extra}    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

export const headersFor = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** Sends `body` and yields each event of the stream; throws an Error with the server's message if it refuses. */
export async function* send(body, key, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headersFor(key) },
  });
  if (!response.ok) {
    const reply = await response.json().catch(() => null);
    throw new Error(reply?.error?.message ?? `The server answered ${response.status}.`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a keep-alive comment
      if (event === "data: [DONE]") return;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}
