// The server's API: requests with the key, errors as sentences, streams as events.

let key = sessionStorage.getItem("apb-key") || "";
let askForKey = async () => "";

export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** A request; errors have a sentence for people as their message. */
export async function request(path, options = {}) {
  for (;;) {
    const headers = { ...(options.body && { "Content-Type": "application/json" }) };
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached. See whether it is still running, then try again.");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await sentence(response));
    const given = await askForKey(Boolean(key));
    if (!given) throw new Error("Without a key this server answers nothing.");
    key = given;
    sessionStorage.setItem("apb-key", key);
  }
}

export const json = async (path, options) => (await request(path, options)).json();

export const post = (path, body, signal) => request(path, { method: "POST", body: JSON.stringify(body), signal });

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}, and did not say why.`;
  }
}

/** The server-sent events of a response: {comment} or {data}, until [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Error("The connection ended before the answer did. Ask again.");
    const whole = (held + part.value).split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      if (event.startsWith(": ")) yield { comment: event.slice(2) };
      else if (event === "data: [DONE]") return;
      else if (event.startsWith("data: ")) {
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new Error(data.error.message);
        yield { data };
      }
    }
  }
}

/** The text of a file; an error that says why it has none. */
export async function textOf(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text;
  } catch {
    // told below
  }
  throw new Error(`${file.name} is not plain text in UTF-8. Save it as such, or paste its text.`);
}
