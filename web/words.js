// Prompt Edit's words: which of the source became which of the target, as the node itself aligns them. Asked of the
// server while people type, and taken from the node's outputs where its prompts come from nodes that only a run knows.
import { api } from "../../scripts/api.js";
import { addBox, after, element } from "./box.js";

const PROMPTS = ["source_prompt", "target_prompt"];
const PAUSE = 300; // milliseconds without a key pressed
const MEANING = {
    kept: "kept: looks where the source's looked",
    swapped: "swapped: looks where the word above looked",
    new: "new: finds a place of its own",
    dropped: "left out",
};

// Nodes whose outputs are what their widgets say, output by widget.
const PASSED = {
    PalimpsestDemoScene: { source_prompt: "caption", target_prompt: "edited_caption" },
    PrimitiveString: { STRING: "value" },
    PrimitiveStringMultiline: { STRING: "value" },
};

function widgetOf(node, name) {
    return node.widgets?.find((widget) => widget.name === name);
}

// What is linked to an input of a node: the node and the name of its output.
function origin(node, name) {
    const link = node.graph?.getLink(node.inputs?.find((input) => input.name === name)?.link);
    const from = link && node.graph.getNodeById(link.origin_id);
    return from && { node: from, output: from.outputs[link.origin_slot].name };
}

// The widget whose value an input has, if one has it.
function sourceOf(node, name) {
    const from = origin(node, name);
    if (!from) return widgetOf(node, name);
    const passed = PASSED[from.node.type]?.[from.output];
    return passed && sourceOf(from.node, passed);
}

// Nodes that take the edit and have this widget, set by hand.
function takers(node, type, name) {
    const links = node.outputs.find((output) => output.name === "prompt_edit")?.links ?? [];
    return links
        .map((id) => node.graph.getNodeById(node.graph.getLink(id)?.target_id))
        .filter((taker) => taker?.type === type && !origin(taker, name));
}

// Adds an entry to a list with commas between, or takes out the one that is there already.
function toggle(taker, name, entry, isSame) {
    const widget = widgetOf(taker, name);
    const entries = widget.value.split(",").map((part) => part.trim()).filter(Boolean);
    const others = entries.filter((part) => !isSame(part));
    widget.value = (others.length < entries.length ? others : [...entries, entry]).join(", ");
    widget.callback?.(widget.value);
    taker.graph.setDirtyCanvas(true, true);
    return `${taker.title}, ${name}: ${widget.value || "empty"}`;
}

// Where a word goes that is clicked: what happened, in words.
function pick(node, word, side, shift) {
    const [blend] = takers(node, "PalimpsestLocalBlend", "words");
    const [control] = takers(node, "PalimpsestP2PAttentionController", "reweight");
    if (control && side === "target" && (shift || !blend))
        return toggle(control, "reweight", `${word}:1.5`, (part) => part.split(":")[0].trim() === word);
    if (blend) return toggle(blend, "words", word, (part) => part === word);
    navigator.clipboard?.writeText(word);
    return `copied: ${word}`;
}

export function addWords(node) {
    const box = addBox(node, "palimpsest_words", 62);
    const words = element("div", "palimpsest-words");
    const note = element("div", "palimpsest-note", "The words are shown here once the prompts are known: run this.");
    box.append(words, note);

    function drawWord(word, side, view, state) {
        const isWord = /[\p{L}\p{N}]/u.test(word);
        const drawn = element(isWord ? "button" : "span", "palimpsest-word", word);
        if (view.unknown.includes(word)) drawn.classList.add("palimpsest-unknown");
        drawn.title = MEANING[state];
        if (!isWord) return drawn;
        drawn.type = "button";
        drawn.title += "\nClick: to Local Blend's words. Shift and click: to P2P Attention Controller's reweight.";
        drawn.addEventListener("click", (event) => {
            note.textContent = pick(node, word, side, event.shiftKey);
        });
        return drawn;
    }

    function draw(view) {
        const pairs = view.pairs.map((pair) => {
            const drawn = element("span", `palimpsest-pair palimpsest-${pair.state}`);
            const [source, target] = ["source", "target"].map((side) => {
                const row = element("span", "palimpsest-side");
                row.append(...pair[side].map((word) => drawWord(word, side, view, pair.state)));
                return row;
            });
            drawn.append(source, element("span", "palimpsest-link"), target);
            return drawn;
        });
        words.replaceChildren(...pairs);
        note.textContent = view.text;
    }

    let asked = 0;
    let timer;
    async function ask() {
        const widgets = [...PROMPTS, "alignment"].map((name) => sourceOf(node, name));
        if (!widgets.every(Boolean)) return;
        widgets.forEach(watch);
        const number = ++asked;
        const [source, target, alignment] = widgets.map((widget) => widget.value);
        const demo = origin(node, "clip")?.node.type === "PalimpsestLoadDemoModel";
        const body = { source, target, alignment, demo };
        const answer = await api.fetchApi("/palimpsest/alignment", { method: "POST", body: JSON.stringify(body) });
        const view = await answer.json();
        if (number !== asked) return;
        if (answer.ok) draw(view);
        else note.textContent = view.error;
    }
    function askSoon() {
        clearTimeout(timer);
        timer = setTimeout(() => ask().catch(() => {}), PAUSE); // a server that is gone says so elsewhere
    }

    const watched = new WeakSet();
    function watch(widget) {
        if (watched.has(widget)) return;
        watched.add(widget);
        after(widget, "callback", askSoon);
    }

    after(node, "onConfigure", askSoon);
    after(node, "onConnectionsChange", askSoon);
    after(node, "onExecuted", (output) => {
        const [view] = output?.palimpsest_words ?? [];
        if (view) draw(view);
    });
    askSoon();
}
