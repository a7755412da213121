"""GradAudit the plain way: a batch of one, autograd, every gradient held. Nothing of lightleak's.

Records come in as (image, prompt, text); the model and processor are those of transformers.
"""

import re

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(folder, adapter=None, dtype=torch.float64):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).to(dtype)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def inputs_and_labels(processor, dtype, image, prompt, text):
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": prompt}],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    template = processor.apply_chat_template
    alone = template([question], add_generation_prompt=True, tokenize=False)
    full = template([question, answer], tokenize=False)
    inputs = processor(images=[image], text=[full], return_tensors="pt")
    before = processor(images=[image], text=[alone], return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :before] = -100
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return dict(inputs), labels


def loss_of(model, inputs, labels):
    """Mean cross-entropy over the labelled tokens, in the model's own precision."""
    logits = model(**inputs).logits[0, :-1]
    targets = labels[0, 1:]
    return torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100])


def selected(model, strategy):
    """Names of the selected parameters, by the layout of a LLaVA."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    if strategy == "lora":
        return [name for name in names if "lora_" in name]
    layer = {
        "text": re.compile(r"language_model\.layers\.(\d+)\."),
        "vision": re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\."),
    }
    last = {
        part: sorted({int(m.group(1)) for name in names if (m := pattern.search(name))})[-3:]
        for part, pattern in layer.items()
    }
    chosen = []
    for name in names:
        within = {part: pattern.search(name) for part, pattern in layer.items()}
        block = any(
            match and (strategy == "all" or int(match.group(1)) in last[part])
            for part, match in within.items()
        )
        if ("lora_" in name) != strategy.startswith("lora"):
            continue
        if block or "multi_modal_projector" in name:
            chosen.append(name)
    return chosen


def gradients(model, processor, names, records):
    """One dict of whole gradients a record; parameters without a gradient are absent."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    dtype = next(model.parameters()).dtype
    found = []
    for record in records:
        model.zero_grad(set_to_none=True)
        loss_of(model, *inputs_and_labels(processor, dtype, *record)).backward()
        found.append(
            {n: parameters[n].grad.clone() for n in names if parameters[n].grad is not None}
        )
    return found


def cosine(a, b, dim):
    dots = (a * b).sum(dim)
    norms = a.norm(dim=dim) * b.norm(dim=dim)
    return torch.where(norms > 0, dots / norms, 0.0)


def row_and_column_cosines(gradient, reference):
    return {
        (name, axis): cosine(gradient[name], reference[name], dim)
        for name in reference
        for axis, dim in (("row", 1), ("column", 0))
    }


def mean(cosines):
    return {key: torch.stack([each[key] for each in cosines]).mean(0) for key in cosines[0]}


def masked(gap, strategy, tau, q):
    if strategy == "fixed_tau":
        return gap > tau
    if strategy == "tau_or_topq":
        kept = gap > tau
        return kept if kept.any() else gap >= gap.quantile(q)
    if strategy == "tau_or_topq_union":
        return (gap > tau) | (gap >= gap.quantile(q))
    if strategy == "adaptive_keep":
        kept = gap > tau
        return kept if kept.double().mean() >= 0.2 else gap >= gap.quantile(0.8)
    kept = gap > gap.quantile(q)
    if not kept.any():
        kept[gap.topk(min(16, len(gap))).indices] = True
    return kept


def reference_of(members):
    return {name: torch.stack([g[name] for g in members]).mean(0) for name in members[0]}


def published_cosines(members, nonmembers, probes):
    """Cosines with the mean over members, of every record."""
    reference = reference_of(members)
    return [
        [row_and_column_cosines(gradient, reference) for gradient in side]
        for side in (members, nonmembers, probes)
    ]


def published_scores(cosines, strategy, tau, q):
    """The published protocol: mask by the calibration records, mean of what is kept."""
    members, nonmembers, probes = cosines
    inside, outside = mean(members), mean(nonmembers)
    kept = {key: masked(inside[key] - outside[key], strategy, tau, q) for key in inside}
    return [torch.cat([each[key][kept[key]] for key in kept]).mean().item() for each in probes]


def crossed_scores(gradients_, suspect, folds, strategy, tau, q):
    """Folds crossed, each calibration suspect compared with a reference that leaves it out."""
    result = [None] * len(gradients_)
    for k in sorted(set(folds)):
        others = [i for i in range(len(gradients_)) if folds[i] != k]
        members = [i for i in others if suspect[i]]
        cosines = []
        for i in members:
            rest = reference_of([gradients_[j] for j in members if j != i])
            cosines.append(row_and_column_cosines(gradients_[i], rest))
        reference = reference_of([gradients_[j] for j in members])
        outside = [
            row_and_column_cosines(gradients_[i], reference) for i in others if not suspect[i]
        ]
        gaps = {key: mean(cosines)[key] - mean(outside)[key] for key in cosines[0]}
        kept = {key: masked(gap, strategy, tau, q) for key, gap in gaps.items()}
        for i in range(len(gradients_)):
            if folds[i] == k:
                mine = row_and_column_cosines(gradients_[i], reference)
                result[i] = torch.cat([mine[key][kept[key]] for key in kept]).mean().item()
    return result
