"""The table of scripts/synthesize.sh: a line for each model, what it is worth and what it gives away."""

import os

from base.files import read_object

PRIVATE, NO_PRIVACY, NOTHING, PRIVATE_TEXT = "private", "no_privacy", "nothing", "private_text"
MODELS = (NOTHING, PRIVATE, NO_PRIVACY, PRIVATE_TEXT)
TITLES = {
    NOTHING: "nothing (the start)",
    PRIVATE: "samples, with privacy",
    NO_PRIVACY: "samples, without privacy",
    PRIVATE_TEXT: "the private text itself",
}
WRITTEN = "what scripts/synthesize.sh writes; remove the folder"


def row_of(runs: str, name: str, seconds: dict[str, dict[str, float]]) -> dict:
    """The row of one of MODELS: use, and where it wrote samples, its judgement without examples and curves. seconds: of
    each job, "wall" and "cpu"."""
    folder = os.path.join(runs, f"use_{name}")
    losses = read_object(os.path.join(folder, "test_loss.json"), WRITTEN)["files"]["test"]["losses"]
    scores = read_object(os.path.join(folder, "scores.json"), WRITTEN)["scores"]
    row: dict = {"name": name, "use": {"loss": sum(losses) / len(losses), "BLEU": scores["BLEU"]}}
    if name not in (PRIVATE, NO_PRIVACY):
        return row
    report = read_object(os.path.join(runs, name, "privacy.json"), WRITTEN)
    judged = read_object(os.path.join(runs, name, "judgement.json"), WRITTEN)
    judged.pop("examples")
    for attack in judged["membership"].values():
        attack.pop("curve")
    took = {job: seconds.get(f"{job} {name}", {}) for job in ("train", "sample")}
    keys = ("epsilon_prv", "delta", "unit", "relation", "N", "attack_risk")
    return {**row, "privacy": {key: report.get(key) for key in keys}, "judged": judged, "seconds": took}


def lines_of(rows: list[dict]) -> list[dict[str, str]]:
    """The lines, head -> cell. "-" stands where a row has no such figure."""
    lines = []
    for row in rows:
        judged = row.get("judged", {})
        line = {"a small model of": TITLES[row["name"]], "epsilon": "-"}
        if "privacy" in row:
            epsilon = row["privacy"]["epsilon_prv"]
            line["epsilon"] = "inf" if epsilon in (None, "inf") else f"{float(epsilon):.2f}"
        if row["name"] == NOTHING:
            line["epsilon"] = "0"
        elif row["name"] == PRIVATE_TEXT:
            line["epsilon"] = "inf"
        line["test loss"], line["BLEU"] = f"{row['use']['loss']:.3f}", f"{row['use']['BLEU']:.4f}"
        secrets = judged.get("secrets", {})
        for kind in ("new tokens", "ordinary words"):
            recovered = exposure = "-"
            if kind in secrets:
                planted, other = (secrets[kind][group] for group in ("planted", "not planted"))
                recovered = f"{planted['recovered']['found']} of {planted['secrets']}"
                exposure = f"{planted['exposure']['mean']:.1f} ({other['exposure']['mean']:.1f})"
            line[f"{kind}: recovered"], line[f"{kind}: exposure [bits]"] = recovered, exposure
        attacks = judged.get("membership")
        line["membership: area by loss, by reference"] = line["true positives at 1 %"] = "-"
        if attacks:
            found = [attacks[name] for name in ("loss", "reference")]
            line["membership: area by loss, by reference"] = ", ".join(f"{one['area']['value']:.3f}" for one in found)
            shares = [one["true_positives"]["0.01"] for one in found]
            line["true positives at 1 %"] = ", ".join(f"{share['value']:.3f}" if share else "-" for share in shares)
        copies = judged.get("copies")
        line["copied span [words]"] = line["near duplicates"] = "-"
        if copies:
            ours, other = copies["private, as many as held out"], copies["held out"]
            line["copied span [words]"] = f"{ours['spans']['mean']:.1f} ({other['spans']['mean']:.1f})"
            shares = [one["duplicates"]["near"]["value"] for one in (ours, other)]
            line["near duplicates"] = f"{shares[0]:.3f} ({shares[1]:.3f})"
        for job, head in (("train", "training, CPU [s]"), ("sample", "samples, CPU [s]")):
            took = row.get("seconds", {}).get(job, {}).get("cpu")
            line[head] = "-" if took is None else f"{took:.0f}"
        lines.append(line)
    return lines
