"""The checks by name: what each says, and what to do about it. Their limits are in ``config/audit_schema.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.config.audit_schema import AuditLimits
from sft_dist.data.audit.findings import Example, Finding, Severity

# A warning about a smaller share of a source than this is for information: every large data set has a few of each.
NOTEWORTHY_SHARE = 0.001


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        says: what is wrong, as the end of a sentence that begins "3 of 40 rows".
        fix: one line.
        severity: of a finding below its limit.
        unit: what is counted.
    """

    says: str
    fix: str
    severity: Severity = "warning"
    unit: str = "rows"


CHECKS: dict[str, Check] = {
    "masked_source": Check(
        "have a token to train on: every label of the source is masked",
        "check the source's columns and that the chat template renders the assistant's turns",
    ),
    "no_supervised_token": Check(
        "have no token to train on, every label is masked",
        "give them an answer, or remove them",
    ),
    "unsupervised_end": Check(
        "do not end their last answer in a trained end-of-turn token: the model would not learn to stop",
        "let the labels cover the end-of-turn token (token ids), write it at the end of the last trained segment, or "
        "set data.chat_template",
    ),
    "double_bos": Check(
        "begin with two BOS tokens",
        "remove the BOS from the text: template or tokenizer writes it already",
    ),
    "rejected_row": Check(
        "cannot be read or trained on",
        "correct them, or leave them out by data.on_bad_row: skip, if so many may be missing",
    ),
    "over_length": Check(
        "are longer than data.max_seq_len",
        "raise data.max_seq_len, split the rows, or accept what data.over_length does with them",
    ),
    "answer_cut": Check(
        "have their last answer cut or lost at data.max_seq_len",
        "raise data.max_seq_len, shorten the prompts, or set data.over_length to drop",
    ),
    "exact_duplicate": Check(
        "are the same as an earlier row",
        "remove them, or keep them on purpose: they count that many times in training",
    ),
    "near_duplicate": Check(
        "are nearly the same as an earlier row",
        "keep one of each group, or accept the weight that the others add",
    ),
    "leak_exact": Check(
        "have a prompt, or a whole text, that is trained on",
        "remove them from the held-out set or from the training set: their loss measures memory",
    ),
    "leak_near": Check(
        "are nearly the same as a training row, in their prompt or as a whole",
        "look at the pairs; remove those that ask for the same from one of the sets",
    ),
    "contradiction": Check(
        "have the prompt of another row and a different answer",
        "keep one answer for each prompt, unless several are meant",
    ),
    "empty_answer": Check("have an empty answer", "remove them, or write the answer"),
    "short_answer": Check(
        "are answered with a single word",
        "check that the answers are complete; in a source of labels this is right",
    ),
    "answer_is_question": Check(
        "repeat the question as their answer", "correct the columns of the source, or the rows"
    ),
    "mojibake": Check(
        "have text that was read in a wrong encoding",
        "read the original again in its encoding; what is U+FFFD now cannot be recovered",
    ),
    "language_mismatch": Check(
        "answer in another language than they are asked in, which is rare in this source",
        "remove them, or say the language in the question",
    ),
    "inconsistent_format": Check(
        "have another form than nearly all answers of the source",
        "bring them into the form of the others, or make them a source of their own",
    ),
    "role_marker": Check(
        "have the name of a role at the beginning of a line of an answer, such as ### Response: or User:",
        "split such rows into turns: the model would learn to write the user's part",
    ),
    "foreign_token": Check(
        "have another model's special token typed into their text",
        "remove the token: the chat template ends the turns",
    ),
    "special_token_in_text": Check(
        "have special tokens of this model in their text, which it reads as the template's own",
        "remove or rewrite them: they end turns and open others where nobody did",
    ),
    "untrained_token": Check(
        "train the model to produce a token whose embedding was never trained and is frozen",
        "name the token in method.train_tokens, or use a chat template without it",
    ),
    "placeholder": Check("have a placeholder that was not filled in", "fill it in, or remove the rows"),
    "markup_remains": Check(
        "have remains of HTML in their text", "unescape entities and strip tags where text was extracted from pages"
    ),
    "boilerplate": Check(
        "refuse, or speak as an AI language model",
        "remove them unless the model shall answer so: a few per cent are enough to teach it",
    ),
    "role_order": Check(
        "end with a question or have two turns of one role in a row",
        "remove the turn without an answer, or join the turns; many templates refuse or hide them",
    ),
    "dominant_source": Check(
        "of the set come from this source", "weigh or cut the sources, if the others are to count", "info", "tokens"
    ),
    "render_diff": Check(
        "have another prompt at inference than in training",
        "set data.chat_template to one whose generation prompt opens a turn as the finished turn does",
        unit="answers compared",
    ),
}


def finding(
    name: str,
    *,
    set: str,
    source: str | None,
    count: int,
    total: int,
    limits: AuditLimits,
    examples: Sequence[Example] = (),
    detail: str = "",
    severity: Severity | None = None,
) -> Finding:
    """A finding of the check ``name``: an error where its share is over its limit.

    Args:
        detail: follows what the check says.
        severity: in place of the check's own, below the limit.
    """
    check = CHECKS[name]
    share = count / total
    limit: float | None = getattr(limits, name)
    usual = severity or check.severity
    if usual == "warning" and share < NOTEWORTHY_SHARE:
        usual = "info"
    is_error = limit is not None and share > limit
    says = f"{count:,} of {total:,} {check.unit} ({percent(share)}) {check.says}"
    if name == "masked_source":
        says = f"none of {total:,} rows {check.says}"
    return Finding(
        check=name,
        severity="error" if is_error else usual,
        set=set,
        source=source,
        count=count,
        total=total,
        share=share,
        limit=limit,
        unit=check.unit,
        examples=tuple(examples),
        what=f"{says}{'; ' if detail else ''}{detail}",
        fix=check.fix,
    )


def percent(share: float) -> str:
    """``0.03 %``, ``4.1 %``, ``100 %``; what is not nothing is not shown as 0, what is not all not as 100."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.01:
        return "< 0.01 %"
    if value > 99.9:
        return "> 99.9 %"
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"
