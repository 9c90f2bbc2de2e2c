// Draws openapi.json: each route with its parameters, answers and an example.
const table = (caption, rows) => {
  const element = made("table"), body = made("tbody");
  element.append(made("caption", caption), body);
  for (const cells of rows) {
    const row = made("tr");
    row.append(...cells.map((cell) => made("td", cell)));
    body.append(row);
  }
  return element;
};
const draw = (described) => {
  for (const [path, methods] of Object.entries(described.paths)) {
    for (const [method, one] of Object.entries(methods)) {
      const card = made("section", undefined, "card"), title = made("h2", undefined, "route");
      title.append(made("span", method.toUpperCase(), "method"), made("span", path));
      card.append(title, made("p", one.description || one.summary));
      const example = one["x-example"];
      if (example) card.append(made("pre", example.replaceAll("{address}", location.origin)));
      if (one.parameters) card.append(table("parameters", one.parameters.map((each) => [each.name, each.description])));
      card.append(table("answers", Object.entries(one.responses).map(([status, each]) => [status, each.description])));
      at("routes").append(card);
    }
  }
};
fetch("/openapi.json").then((answer) => answer.json()).then(draw);
