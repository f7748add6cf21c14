// The server's API. Every request may need a key, so videos and event streams are fetched, too.

const KEY = "mxdit-key";

export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const needsKey = (error) => error instanceof ApiError && error.status === 401;

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers: { ...headers, ...authorization } });
  if (!response.ok) throw new ApiError(response.status, await errorOf(response));
  return response;
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    if (typeof error.message === "string") return error;
  } catch {
    // A proxy's error page, say.
  }
  return { message: `the server answered ${response.status} ${response.statusText}`.trim() };
}

/** JSON; seeds that a double does not hold become text, so that a request can be made again. */
function parse(text) {
  return JSON.parse(text.replace(/"seed":\s*(\d{16,})/g, '"seed":"$1"'));
}

async function json(path, options) {
  return parse(await (await send(path, options)).text());
}

const pathOf = (id, rest = "") => `/v1/videos/${encodeURIComponent(id)}${rest}`;

export const models = async () => (await json("/v1/models")).data;

export function list(limit, after) {
  const query = new URLSearchParams({ limit, order: "desc", ...(after ? { after } : {}) });
  return json(`/v1/videos?${query}`);
}

export const retrieve = (id) => json(pathOf(id));
export const cancel = (id) => json(pathOf(id, "/cancel"), { method: "POST" });
export const remove = (id) => json(pathOf(id), { method: "DELETE" });
export const content = async (id) => (await send(pathOf(id, "/content"))).blob();
export const firstFrame = async (id) => (await send(pathOf(id, "/input"))).blob();

/** Ask for a video; `image` is the first frame, or null. */
export function create(fields, image) {
  if (image === null) {
    const headers = { "Content-Type": "application/json" };
    return json("/v1/videos", { method: "POST", headers, body: JSON.stringify(fields) });
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    body.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  body.append("input_reference", image, image.name ?? "first-frame");
  return json("/v1/videos", { method: "POST", body });
}

/** The states of a video, as its event stream tells them. */
export async function* events(id, signal) {
  const response = await send(pathOf(id, "/events"), { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}
