"""Claims about the arms of a study, written down before it is run, and what their intervals say to each."""

from evaluations import pages, paired, tables

WAYS = ("below", "above", "near")
KEYS = {"arm", "of", *WAYS, "within", "source"}
VERDICTS = "reproduced", "not reproduced", "not decidable"


def check(claims, arms):
    """
    Raise ValueError for claims {text: {arm, of, and below, above or near}} that no study of these arms could judge.

    :param arms: their names. `of` is a score, as fid; `below`, `above`: the arm whose score is claimed to be larger or
        smaller; `near`, with `within`: the arm from whose score it is claimed to differ by no more than that; `source`:
        who claims it, and what was found there.
    """
    for text, claim in claims.items():
        where = f"claim {text!r}"
        if not isinstance(claim, dict):
            raise ValueError(f'{where} must be a table, as {{ arm = "x", of = "fid", below = "base" }}, not {claim!r}')
        for key in claim:
            if key not in KEYS:
                raise ValueError(f"{where} has an unknown entry {key!r}: use {', '.join(sorted(KEYS))}")
        ways = [way for way in WAYS if way in claim]
        if len(ways) != 1 or "arm" not in claim:
            raise ValueError(f"{where}: give arm, and one of below, above and near, with the arm it is compared with")
        for name in (claim["arm"], claim[ways[0]]):
            if name not in arms:
                raise ValueError(f"{where}: there is no arm {name!r}; there are {', '.join(arms)}")
        if claim["arm"] == claim[ways[0]]:
            raise ValueError(f"{where} compares arm {claim['arm']!r} with itself")
        if claim.get("of") not in tables.NAMES:
            raise ValueError(f"{where}: of = {claim.get('of')!r} is no score; there are {', '.join(tables.NAMES)}")
        within = claim.get("within")
        if ("near" in claim) != (type(within) in (int, float) and within > 0):
            raise ValueError(f"{where}: near asks for within, the largest difference that is near; the others do not")


def judged(claims, scores):
    """
    What a study says to each claim, as a list of dicts of plain values: the claim; finding, the paired difference of
    the arm to the other; verdict, one of VERDICTS.

    Below and above are reproduced where the whole interval is on the side that is claimed, not reproduced where it is
    on the other; near is where it lies within the margin, and is not where it lies outside (two one-sided tests,
    Schuirmann 1987, by the interval of 95 %, so each at 2.5 %).

    :param scores: {arm: {score: {seed: value}}}.
    """
    found = []
    for text, claim in claims.items():
        other = next(claim[way] for way in WAYS if way in claim)
        ours, theirs = (scores.get(name, {}).get(claim["of"], {}) for name in (claim["arm"], other))
        difference = paired.difference(ours, theirs)
        finding = paired.plain(difference) if difference else None
        found.append({"claim": text, **claim, "finding": finding, "verdict": verdict(claim, difference)})
    return found


def verdict(claim, difference):
    """One of VERDICTS for a claim and a Paired, or None where nothing was found."""
    if difference is None or not difference.standard_error > 0:
        return VERDICTS[2]
    low, high = difference.interval
    margin = claim.get("within", 0.0)
    if "near" in claim:
        yes, no = -margin <= low and high <= margin, low > margin or high < -margin
    else:
        yes, no = (high < 0, low > 0) if "below" in claim else (low > 0, high < 0)
    return VERDICTS[0 if yes else 1 if no else 2]


def table(found):
    """The table of judged claims."""
    rows = []
    for each in found:
        said = f"{tables.NAMES[each['of']]}, {each['arm']} - {next(each[way] for way in WAYS if way in each)}"
        if "near" in each:
            said += f", within ±{each['within']:g}"
        rows.append([each["claim"], each.get("source", "-"), said, *paired.texts(each["finding"]),
                     each["verdict"]])  # fmt: skip
    return pages.Table(["claim", "source", "compared", "found", "95 % interval", "verdict"], rows)
