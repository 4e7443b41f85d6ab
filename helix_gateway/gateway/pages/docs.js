// Shows /openapi.json: every route with its fields, answers, streams and errors, and a way to try it against the server
// that the page came from. Knows nothing about any one route; asks nobody but that server.
"use strict";

let api;

// ---- building elements ---------------------------------------------------------------------------------------------

function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text in which `backticks` are code and blank lines part paragraphs. */
function prose(text) {
  return (text || "").split(/\n\s*\n/).filter(Boolean).map((paragraph) => el("p", {}, inline(paragraph)));
}

function inline(text) {
  return text.split("`").map((piece, place) => (place % 2 ? el("code", {}, piece) : piece));
}

// ---- reading schemas -----------------------------------------------------------------------------------------------

function resolve(schema) {
  if (!schema || !schema.$ref) return schema || {};
  return schema.$ref.slice(2).split("/").reduce((node, key) => node[key], api);
}

const kindsOf = (schema) => (schema.anyOf || schema.oneOf || []).filter((kind) => kind.type !== "null");

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const kinds = kindsOf(schema);
  if (kinds.length) return [...new Set(kinds.map(typeOf))].join(" or ");
  const types = [schema.type].flat().filter((type) => type && type !== "null");
  if (types[0] === "array") return schema.maxItems === 0 ? "empty array" : `array of ${typeOf(schema.items || {})}`;
  if (types[0] === "object" && schema.additionalProperties && !schema.properties && schema.additionalProperties !== true)
    return `object of ${typeOf(schema.additionalProperties)}`;
  return types.join(" or ") || (schema.type ? "null" : "anything");
}

function boundsOf(schema) {
  const told = [];
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const high = schema.maximum ?? schema.exclusiveMaximum;
  const from = schema.exclusiveMinimum !== undefined ? `over ${low}` : low;
  if (low !== undefined && high !== undefined) told.push(`${from} to ${high}`);
  else if (low !== undefined) told.push(schema.exclusiveMinimum !== undefined ? from : `at least ${low}`);
  else if (high !== undefined) told.push(`at most ${high}`);
  if (schema.minLength) told.push(`at least ${schema.minLength} character`);
  if (schema.maxLength !== undefined) told.push(`at most ${schema.maxLength} characters`);
  if (schema.minItems) told.push(`at least ${schema.minItems} item`);
  if (schema.maxItems) told.push(`at most ${schema.maxItems} items`);
  if (schema.maxProperties) told.push(`at most ${schema.maxProperties} entries`);
  for (const part of [...kindsOf(schema), schema.items, schema.additionalProperties].filter((kind) => kind && !kind.$ref))
    told.push(...boundsOf(part).map((bound) => (part === schema.items ? `each ${bound}` : bound)));
  return [...new Set(told)];
}

/** The objects that a field may hold. */
function objectsIn(schema) {
  if (schema.$ref) return resolve(schema).properties ? [schema] : objectsIn(resolve(schema));
  const inner = [...kindsOf(schema), schema.items, schema.additionalProperties].filter((part) => part && part !== true);
  return inner.flatMap(objectsIn);
}

// ---- showing them --------------------------------------------------------------------------------------------------

const INERT = "Accepted, and changes nothing here.";

function fields(schema, seen = []) {
  const body = resolve(schema);
  const required = new Set(body.required || []);
  const all = Object.entries(body.properties || {});
  const inert = all.filter(([, field]) => field.description === INERT).map(([name]) => name);
  const shown = all.filter(([name]) => !inert.includes(name));
  shown.sort(([a], [b]) => required.has(b) - required.has(a));
  const rows = shown.map(([name, field]) => fieldRow(name, field, required.has(name), seen));
  if (inert.length) rows.push(el("tr", {}, el("td", {}, inert.join(", ")), el("td", {}, INERT)));
  return el("table", {}, el("tbody", {}, rows));
}

function fieldRow(name, field, isRequired, seen) {
  const told = boundsOf(field);
  const plain = typeof field.default !== "object" || Array.isArray(field.default);
  if (plain && ![undefined, ""].includes(field.default)) told.push(`default ${JSON.stringify(field.default)}`);
  const nested = objectsIn(field).filter((part) => !seen.includes(part.$ref));
  return el(
    "tr",
    {},
    el("td", {}, name, isRequired ? el("span", { class: "required" }, "required") : null),
    el(
      "td",
      {},
      el("span", { class: "type" }, typeOf(field)),
      told.length ? el("span", { class: "bounds" }, ` · ${told.join(" · ")}`) : null,
      prose(field.description),
      nested.map((part) =>
        el("details", {}, el("summary", {}, `Fields of ${typeOf(part)}`), fields(part, [...seen, part.$ref])),
      ),
    ),
  );
}

function answers(operation) {
  const items = Object.entries(operation.responses).map(([status, reference]) => {
    const response = resolve(reference);
    const bodies = Object.entries(response.content || {}).map(([type, content]) => {
      const schema = content["x-event-schema"] || content.schema;
      const what = content["x-event-schema"] ? `each event: ${typeOf(schema)}` : schema.$ref ? typeOf(schema) : "";
      const label = [el("code", {}, type), what ? ` ${what}` : ""];
      if (!objectsIn(schema).length) return el("p", {}, label);
      return el("details", {}, el("summary", {}, label), fields(schema, [schema.$ref]));
    });
    const headers = Object.entries(response.headers || {}).map(([name, header]) =>
      el("tr", {}, el("td", {}, name), el("td", {}, resolve(header).description)),
    );
    return el(
      "li",
      {},
      el("span", { class: status < 400 ? "status" : "status fault" }, status),
      " ",
      inline(response.description),
      bodies,
      el("details", {}, el("summary", {}, "Headers"), el("table", {}, el("tbody", {}, headers))),
    );
  });
  return [el("h3", {}, "Answers"), el("ul", { class: "responses" }, items)];
}

function section(method, path, operation) {
  const schema = operation.requestBody?.content["application/json"].schema;
  return el(
    "section",
    { id: operation.operationId, "aria-labelledby": `${operation.operationId}-title` },
    el("h2", { id: `${operation.operationId}-title` }, operation.summary),
    el(
      "p",
      { class: "path" },
      badge(method),
      path,
      el("span", { class: "open" }, operation.security ? "needs a key where one is set" : "needs no key"),
    ),
    el(
      "div",
      { class: "columns" },
      el(
        "div",
        {},
        prose(operation.description),
        schema ? [el("h3", {}, "Body"), fields(schema)] : null,
        answers(operation),
      ),
      trial(method, path, operation),
    ),
  );
}

const badge = (method) => el("span", { class: `method ${method}` }, method.toUpperCase());

// ---- trying --------------------------------------------------------------------------------------------------------

function trial(method, path, operation) {
  const examples = Object.values(operation.requestBody?.content["application/json"].examples || {});
  const id = operation.operationId;
  const pretty = (value) => JSON.stringify(value, null, 2);
  const body = examples.length
    ? el("textarea", { id: `${id}-body`, rows: "14", spellcheck: "false", "aria-label": `Body of ${path}` }, pretty(examples[0].value))
    : null;
  const choice = el(
    "select",
    { "aria-label": "Example", onchange: () => ((body.value = pretty(examples[choice.value].value)), snippets.show()) },
    examples.map((example, place) => el("option", { value: place }, example.summary)),
  );
  const parts = (operation.parameters || []).map((parameter) =>
    el("input", { name: parameter.name, placeholder: parameter.name, "aria-label": parameter.description }),
  );
  const url = () => parts.reduce((told, part) => told.replace(`{${part.name}}`, part.value), path);
  const output = el("div", { "aria-live": "polite", "aria-busy": "false" });
  const send = el("button", { type: "button", class: "send", onclick: run }, "Send");
  const stop = el("button", { type: "button", disabled: true, onclick: () => abort.abort() }, "Stop");
  const snippets = snippetsFor(method, url, operation, body);
  let abort;

  async function run() {
    abort = new AbortController();
    [send.disabled, stop.disabled] = [true, false];
    output.setAttribute("aria-busy", "true");
    try {
      await ask(method, url(), body?.value, abort.signal, output);
    } catch (error) {
      const said = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
      output.append(el("p", { class: "fault" }, said));
    } finally {
      [send.disabled, stop.disabled] = [false, true];
      output.setAttribute("aria-busy", "false");
    }
  }

  body?.addEventListener("input", () => snippets.show());
  body?.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !send.disabled) run();
  });
  parts.forEach((part) => part.addEventListener("input", () => snippets.show()));
  return el(
    "div",
    { class: "try" },
    el("h3", {}, "Try it"),
    examples.length > 1 ? el("div", { class: "bar" }, choice) : null,
    body,
    parts.length ? el("div", { class: "bar" }, parts) : null,
    el("div", { class: "bar" }, send, stop, body ? el("span", { class: "figures" }, "Ctrl+Enter sends") : null),
    output,
    snippets.element,
  );
}

const keyField = () => document.getElementById("key").value.trim();

async function ask(method, url, body, signal, output) {
  const headers = keyField() ? { Authorization: `Bearer ${keyField()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const start = performance.now();
  const figures = el("p", { class: "figures" }, "Waiting …");
  const text = el("pre", { hidden: true, class: "answer" });
  const raw = el("pre", {});
  const rawBox = el("details", {}, el("summary", {}, "As it came"), raw);
  output.replaceChildren(figures, text, rawBox);
  const response = await fetch(url, { method: method.toUpperCase(), headers, body, signal });
  const events = (response.headers.get("content-type") || "").startsWith("text/event-stream");
  rawBox.open = !events;
  const told = { events: 0, firstMs: null };
  const tell = () => {
    const parts = [`${response.status}`, `${((performance.now() - start) / 1000).toFixed(2)} s`];
    if (events) parts.push(`${told.events} events`);
    if (told.firstMs !== null) parts.push(`first text after ${told.firstMs.toFixed(0)} ms`);
    for (const name of ["x-helix-seed", "x-helix-clamped", "x-helix-ignored-fields"])
      if (response.headers.get(name)) parts.push(`${name}: ${response.headers.get(name)}`);
    figures.textContent = parts.join(" · ");
    figures.className = response.ok ? "figures" : "figures fault";
  };
  const show = (data) => {
    told.events += 1;
    const piece = textOf(data);
    if (!piece) return;
    told.firstMs ??= performance.now() - start;
    text.hidden = false;
    text.append(piece);
  };
  tell();
  let rest = "";
  const decoder = new TextDecoder();
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    const piece = decoder.decode(value, { stream: !done });
    raw.append(piece);
    if (events) {
      const blocks = (rest + piece).split("\n\n");
      rest = blocks.pop();
      blocks.filter((block) => block.startsWith("data: {")).forEach((block) => show(JSON.parse(block.slice(6))));
      tell();
    }
    if (done) break;
  }
  if (!events) finish(response, raw, show);
  tell();
}

function finish(response, raw, show) {
  if (!(response.headers.get("content-type") || "").startsWith("application/json")) return;
  const data = JSON.parse(raw.textContent);
  show(data);
  raw.textContent = JSON.stringify(data, null, 2);
}

/** What a person would read of an answer or an event. */
function textOf(data) {
  if (data.error) return data.error.message;
  if (typeof data.text === "string") return data.text;
  if (!Array.isArray(data.choices)) return "";
  const pieces = data.choices.map((choice) => choice.delta?.content ?? choice.message?.content ?? choice.text ?? "");
  return data.object?.endsWith("chunk") ? pieces.join("") : pieces.join(pieces.length > 1 ? "\n" : "");
}

// ---- snippets ------------------------------------------------------------------------------------------------------

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (value) =>
  value === null ? "None"
  : value === true ? "True"
  : value === false ? "False"
  : Array.isArray(value) ? `[${value.map(python).join(", ")}]`
  : typeof value === "object" ? `{${Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item)}`).join(", ")}}`
  : JSON.stringify(value);

function curl(method, url, operation, body) {
  const lines = [`curl ${location.origin}${url}`];
  if (operation.security) lines.push("-H 'Authorization: Bearer KEY'");
  if (body !== undefined) lines.push("-H 'Content-Type: application/json'", `-d ${quote(body)}`);
  return lines.join(" \\\n  ");
}

function pythonSnippet(method, url, operation, body) {
  const create = { create_chat_completion: "chat.completions", create_completion: "completions" }[operation.operationId];
  if (create) return openaiSnippet(create, JSON.parse(body));
  const headers = operation.security ? ', headers={"Authorization": "Bearer KEY"}' : "";
  const json = body === undefined ? "" : `, json=${python(JSON.parse(body))}`;
  const stream = operation.responses["200"].content["application/json"] ? "" : ", stream=True";
  const show = stream && body !== undefined ? "for line in response.iter_lines():\n    print(line.decode())" : "print(response.text)";
  return `import requests\n\nresponse = requests.${method}("${location.origin}${url}"${json}${headers}${stream})\n${show}`;
}

function openaiSnippet(create, body) {
  const extra = Object.keys(body).filter((name) => OURS.has(name));
  const own = Object.entries(body).filter(([name]) => !OURS.has(name)).map(([name, value]) => `    ${name}=${python(value)},`);
  if (extra.length) own.push(`    extra_body=${python(Object.fromEntries(extra.map((name) => [name, body[name]])))},`);
  const show = body.stream ? "for chunk in answer:\n    print(chunk)" : "print(answer.choices[0])";
  const client = `client = OpenAI(base_url="${location.origin}/v1", api_key="KEY")`;
  return `from openai import OpenAI\n\n${client}\nanswer = client.${create}.create(\n${own.join("\n")}\n)\n${show}`;
}

/** Options that OpenAI's client takes only beside its own. */
const OURS = new Set(
  ("top_k min_p repetition_penalty min_tokens stop_token_ids bad_words ignore_eos skip_special_tokens speculation " +
    "include_stop_str_in_output prompt_logprobs return_token_ids priority cache_salt add_special_tokens").split(" "),
);

function snippetsFor(method, url, operation, body) {
  const writers = { curl, Python: pythonSnippet };
  const code = el("pre", { tabindex: "0", "aria-label": "The same as a command or program" });
  let chosen = "curl";
  const show = () => {
    try {
      if (body) JSON.parse(body.value);
      code.textContent = writers[chosen](method, url(), operation, body?.value);
    } catch (error) {
      code.textContent = `The body is not valid JSON: ${error.message}`;
    }
    tabs.forEach((tab) => tab.setAttribute("aria-selected", tab.textContent === chosen));
  };
  const tabs = Object.keys(writers).map((name) =>
    el("button", { type: "button", role: "tab", onclick: () => ((chosen = name), show()) }, name),
  );
  const copy = el("button", { type: "button", onclick: () => navigator.clipboard?.writeText(code.textContent) }, "Copy");
  show();
  return { show, element: el("div", {}, el("div", { class: "bar" }, el("span", { role: "tablist" }, tabs), copy), code) };
}

// ---- the page ------------------------------------------------------------------------------------------------------

function render() {
  document.getElementById("version").textContent = api.info.version;
  document.getElementById("about").append(...prose(api.info.description));
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method, operation })),
  );
  for (const tag of api.tags) {
    const tagged = operations.filter(({ operation }) => operation.tags[0] === tag.name);
    const links = tagged.map(({ method, path, operation }) =>
      el("a", { href: `#${operation.operationId}`, title: operation.summary }, badge(method), path),
    );
    document.getElementById("nav").append(el("div", {}, el("h2", {}, tag.name), links));
    document.getElementById("routes").append(...tagged.map((each) => section(each.method, each.path, each.operation)));
  }
  document.body.dataset.ready = "yes";
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

function remembered(store, name, element) {
  element.value = store.getItem(name) || "";
  element.addEventListener("input", () => store.setItem(name, element.value));
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("helix-theme", theme);
}

async function start() {
  if (localStorage.getItem("helix-theme")) chooseTheme(localStorage.getItem("helix-theme"));
  remembered(sessionStorage, "helix-key", document.getElementById("key"));
  document.getElementById("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    const unset = !document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches;
    chooseTheme(dark || unset ? "light" : "dark");
  });
  const response = await fetch("/openapi.json");
  api = await response.json();
  render();
}

start().catch((error) => {
  document.getElementById("about").append(el("p", { class: "fault" }, `The description could not be read: ${error.message}`));
});
