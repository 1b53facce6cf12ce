// What the pack adds to its nodes in the frontend: words to pick under Prompt Edit, and under all others what they say.
// Without it the nodes are as they are, plain boxes.
import { app } from "../../scripts/app.js";
import { addBox } from "./box.js";
import { addWords } from "./words.js";

// Shows the texts among a node's outputs under it, from its first run on.
function addText(node) {
    const executed = node.onExecuted;
    let element;
    node.onExecuted = function (output, ...rest) {
        executed?.call(this, output, ...rest);
        if (!output?.text) return;
        element ??= addBox(this, "palimpsest_text", 34);
        element.textContent = output.text.join(" ");
        element.title = element.textContent;
    };
}

app.registerExtension({
    name: "palimpsest.looking",
    nodeCreated(node) {
        if (node.comfyClass === "PalimpsestPromptEdit") addWords(node);
        else if (node.comfyClass?.startsWith("Palimpsest")) addText(node);
    },
});
