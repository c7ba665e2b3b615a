"use strict";
// A button before each block of code copies it. Without scripts there are no buttons, and the text can be selected.
for (const code of document.querySelectorAll(".copy code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + code.textContent.split("\n")[0]);
  const said = document.getElementById("said");
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // Browsers that keep the clipboard from pages in files still copy what is selected.
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Select and copy";
    said.textContent = copied ? "Copied." : "The text is selected; copy it with your keyboard.";
    setTimeout(() => {
      button.textContent = "Copy";
      said.textContent = "";
    }, 2000);
  });
  code.closest(".copy").append(button);
}
