// Questions to the server, one at a time, so that none waits behind one that nobody needs any more.

const MOST_KEPT = 40; // whole answers; they hold a number for every block

/**
 * Answers by query, and `want(needed, later)`: `needed` are asked first, in their order, `later`
 * fill the time after them. A new call replaces what an earlier one still waited for.
 * `onAnswer(query, answer)` is called for each, `onFailure(message)` where the server gave none.
 */
export function makeAsker(onAnswer, onFailure) {
  const answers = new Map();
  const seen = new Set();
  let wanted = { needed: [], later: [] };
  let isAsking = false;

  const next = () =>
    wanted.needed.find((query) => !answers.has(query)) ??
    wanted.later.find((query) => !seen.has(query));

  function keep(query, answer) {
    answers.delete(query);
    answers.set(query, answer);
    seen.add(query);
    for (const old of answers.keys()) {
      if (answers.size <= MOST_KEPT) break;
      if (!wanted.needed.includes(old)) answers.delete(old);
    }
  }

  async function work() {
    if (isAsking) return;
    isAsking = true;
    for (let query = next(); query !== undefined; query = next()) {
      const asked = wanted;
      try {
        const answer = await ask(query);
        keep(query, answer);
        onAnswer(query, answer);
      } catch (error) {
        onFailure(error.message);
        if (wanted === asked) wanted = { needed: [], later: [] };
      }
    }
    isAsking = false;
  }

  return {
    answers,
    left: () => wanted.later.filter((query) => !seen.has(query)).length,
    want(needed, later) {
      wanted = { needed, later };
      work();
    },
  };
}

async function ask(query) {
  let response;
  try {
    response = await fetch(`/solve?${query}`);
  } catch {
    throw new Error("mxq explore does not answer; is it still running in its terminal?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}
