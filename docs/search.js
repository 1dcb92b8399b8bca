// Scores of the search: a name that is asked for as it is written comes first, so that `fit` leads to the
// function and `Fit` to the class. The rest are Sphinx's own values
var Scorer = {
  score: ([, title, , , score, , kind]) => {
    const query = new URLSearchParams(location.search).get("q").trim().replace(/\(\)$/, "");
    return score + (kind === "object" && `.${title}`.endsWith(`.${query}`) ? 100 : 0);
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
