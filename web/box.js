// A box under a node's widgets that no workflow and no prompt knows of.
const STYLE = `
.palimpsest-box {
    box-sizing: border-box;
    overflow: auto;
    padding: 2px 6px;
    color: var(--input-text, #ddd);
    font: 11px/14px sans-serif;
}
.palimpsest-words { display: flex; flex-wrap: wrap; gap: 4px 2px; }
.palimpsest-pair {
    display: grid;
    grid-template-rows: 16px 6px 16px;
    justify-items: center;
    min-width: 14px;
}
.palimpsest-side { display: flex; gap: 2px; }
.palimpsest-link { width: 2px; background: currentColor; opacity: 0.6; }
.palimpsest-new .palimpsest-link, .palimpsest-dropped .palimpsest-link { visibility: hidden; }
.palimpsest-swapped .palimpsest-side { color: #7db4ff; font-weight: bold; }
.palimpsest-swapped .palimpsest-link { background: #7db4ff; opacity: 1; }
.palimpsest-new .palimpsest-side { color: #ffb05c; font-weight: bold; }
.palimpsest-dropped .palimpsest-side { text-decoration: line-through; opacity: 0.7; }
.palimpsest-word { border: 0; padding: 0 3px; border-radius: 3px; background: none; color: inherit; font: inherit; }
button.palimpsest-word { cursor: pointer; }
button.palimpsest-word:hover, button.palimpsest-word:focus-visible { background: rgb(128 128 128 / 35%); }
.palimpsest-unknown { text-decoration: underline wavy #ff6b6b; }
.palimpsest-note { margin-top: 4px; opacity: 0.85; }
`;

export function element(tag, classes, text = "") {
    const made = document.createElement(tag);
    made.className = classes;
    made.textContent = text;
    return made;
}

// Calls `then` with the same arguments after a method of an object, whether it has one or not.
export function after(object, name, then) {
    const before = object[name];
    object[name] = function (...args) {
        const result = before?.apply(this, args);
        then(...args);
        return result;
    };
}

// The box's element; height: the least that it takes, in pixels.
export function addBox(node, name, height) {
    if (!document.getElementById("palimpsest-style")) {
        const style = element("style", "", STYLE);
        style.id = "palimpsest-style";
        document.head.append(style);
    }
    const box = element("div", "palimpsest-box");
    const widget = node.addDOMWidget(name, name, box, { serialize: false, margin: 4, getMinHeight: () => height });
    widget.serialize = false;
    return box;
}
