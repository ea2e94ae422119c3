// A drawing that scrolls can be scrolled with the keyboard too.
function reach() {
  for (const box of document.querySelectorAll("figure"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("load", reach);
addEventListener("resize", reach);
