// What the pack adds to its nodes in the frontend: words to pick under Prompt Edit, and under all others what they say.
// Without it the nodes are as they are, plain boxes.
import { app } from "../../scripts/app.js";
import { addBox, after } from "./box.js";
import { addWords } from "./words.js";

// Shows the texts among a node's outputs under it, from its first run on.
function addText(node) {
    let box;
    after(node, "onExecuted", (output) => {
        if (!output?.text) return;
        box ??= addBox(node, "palimpsest_text", 36);
        box.textContent = output.text.join(" ");
        box.title = box.textContent;
    });
}

app.registerExtension({
    name: "palimpsest.looking",
    nodeCreated(node) {
        if (node.comfyClass === "PalimpsestPromptEdit") addWords(node);
        else if (node.comfyClass?.startsWith("Palimpsest")) addText(node);
    },
});
