"""What a run trains on, from some rows of files that are here and not prepared: rendered as training would."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.cache import row_settings, source_names, sources_of
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.chunk import tokenise_chunk
from sft_dist.data.mixing import Side, weights_of
from sft_dist.data.prepared import ChosenRows, PreparedData, Tokens
from sft_dist.data.rejected import none_left
from sft_dist.data.sampling import Sample, draw_rows
from sft_dist.data.selection import Counts, NamedStore, Selection, choose_rows, fit, mix, pack, refuse_long_rows
from sft_dist.data.sources import parser_of
from sft_dist.data.token_store import ROW, TokenStore
from sft_dist.errors import DataError
from sft_dist.plan.epoch import Epoch, data_plan, set_bytes, store_bytes, tokens_of_run
from sft_dist.plan.result import DataPlan, Range
from sft_dist.run import Run

# Rows that are packed; more are counted as so many times these.
MAX_PACKED_ROWS = 200_000
NUM_RESAMPLES = 1000
LEAST_ROWS_OF_A_SOURCE = 200


@dataclass(frozen=True)
class SampledSource:
    """Drawn rows of one source, tokenised.

    Args:
        fitted: those that can be trained, as ``CHOSEN``, cut as ``data.over_length`` says.
        tokens, parts: [drawn rows] tokens and rows that are left of each; several where it was split, 0 where dropped.
    """

    config: SourceConfig
    sample: Sample
    named: NamedStore
    fitted: ChosenRows
    tokens: NDArray[np.float64]
    parts: NDArray[np.float64]

    @property
    def num_fitted(self) -> float:
        """Of the whole source."""
        return self.sample.num_rows * float(self.parts.mean())

    @property
    def num_tokens(self) -> float:
        return self.sample.num_rows * float(self.tokens.mean())

    def store_bytes(self) -> float:
        factor, rows = self.sample.num_rows / self.sample.num_drawn, self.named.store.rows
        return store_bytes(factor * len(rows), factor * float(rows["length"].sum(dtype=np.int64)))


def sampled_plan(
    run: Run,
    renderer: ChatRenderer,
    files: dict[Side, list[list[str]] | None],
    *,
    max_sample_rows: int,
    seed: int,
) -> DataPlan:
    """
    Args:
        files: of each source of each set; None: the set is not here, or there is none.
        max_sample_rows: of one set, shared by its sources.

    Raises:
        DataError: as training: a drawn row cannot be trained on, one is too long, or nothing is left.
    """
    data = run.data
    assert files["train"] is not None
    train = _sampled(data, renderer, files["train"], "train", run.seed, max_sample_rows, seed)
    chosen, scale = _chosen(train, data, "train", run.seed, seed)
    lengths = chosen.rows["length"].astype(np.int64)
    trained = None
    if all(source.sample.is_whole for source in train):
        trained = tokens_of_run(run, PreparedData((), chosen.rows, chosen.packs, "", {}, ()))
    epoch = Epoch.of(lengths, float(chosen.rows["supervised"].sum(dtype=np.int64)), chosen.packs, scale=scale)
    cache_bytes = sum(source.store_bytes() for source in train) + set_bytes(epoch.rows, epoch.sequences)
    eval_rows = eval_tokens = 0.0
    if data.eval_split is not None:
        eval_rows, eval_tokens = _evaluated(train, data, run.seed)
    elif files["eval"] is not None:
        held_out = _sampled(data, renderer, files["eval"], "eval", run.seed, max_sample_rows, seed)
        eval_rows, eval_tokens = _evaluated(held_out, data, run.seed)
        cache_bytes += sum(source.store_bytes() for source in held_out)
    return data_plan(
        run,
        epoch,
        basis="sampled",
        tokens=_interval(train, data, epoch.tokens, seed=seed),
        eval_tokens=eval_tokens,
        cache_bytes=cache_bytes + (set_bytes(eval_rows, eval_rows) if eval_rows else 0.0),
        tokens_of_run=trained,
        lost_share=_lost_share(train),
        source=_told(train) + ("; data.eval is not here" if data.eval and files["eval"] is None else ""),
    )


def sampled_set(
    run: Run, renderer: ChatRenderer, files: list[list[str]], *, max_sample_rows: int, seed: int
) -> tuple[PreparedData, str]:
    """Rows of the training set in packs, as training would have them, in memory; and how many they are, for people.

    Args:
        files: of each source.

    Raises:
        DataError: as ``sampled_plan``.
    """
    train = _sampled(run.data, renderer, files, "train", run.seed, max_sample_rows, seed)
    chosen, _ = _chosen(train, run.data, "train", run.seed, seed)
    named = [source.named for source in train]
    stores = tuple(Tokens(each.store.input_ids, each.store.supervised) for each in named)
    names = tuple(each.name for each in named)
    return PreparedData(stores, chosen.rows, chosen.packs, "", {}, names), _told(train)


def _sampled(
    data: DataConfig,
    renderer: ChatRenderer,
    files: Sequence[list[str]],
    side: Side,
    run_seed: int,
    max_sample_rows: int,
    seed: int,
) -> list[SampledSource]:
    """The sources of a set; each gets a part of the rows by its bytes, and some in any case."""
    sources = sources_of(data, side)
    sizes = [sum(map(os.path.getsize, names)) for names in files]
    least = min(LEAST_ROWS_OF_A_SOURCE, max(1, max_sample_rows // len(sources)))
    rest = max(0, max_sample_rows - least * len(sources))
    drawn = []
    for index, (source, names, name) in enumerate(zip(sources, files, source_names(sources), strict=True)):
        most = least + round(rest * sizes[index] / max(1, sum(sizes)))
        drawn.append(_tokenised(index, source, names, name, data, renderer, run_seed, most, seed + index))
    if data.over_length == "error":
        key = f"data.{side}"
        if not all(source.sample.is_whole for source in drawn):
            key += f", {sum(source.sample.num_drawn for source in drawn):,} rows of it"
        refuse_long_rows([source.named for source in drawn], data, key)
    return drawn


def _tokenised(
    index: int,
    source: SourceConfig,
    files: list[str],
    name: str,
    data: DataConfig,
    renderer: ChatRenderer,
    run_seed: int,
    most: int,
    seed: int,
) -> SampledSource:
    settings = row_settings(source, data, run_seed)
    parser = parser_of(source, files, skips_bad_rows=settings.skips_bad_rows)
    sample = draw_rows(source, files, parser, most=most, seed=seed)
    chunks = [tokenise_chunk(rows, parser, renderer, settings) for rows in sample.chunks]
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    rejected = [what for chunk in chunks for what in chunk.rejected]
    rows = np.frombuffer(b"".join(chunk.rows for chunk in chunks), ROW)
    if not len(rows) and rejected:
        raise none_left(files, counts["rejected_rows"], rejected[0])
    store = TokenStore(
        folder=Path(),
        input_ids=np.frombuffer(b"".join(chunk.input_ids for chunk in chunks), np.int32),
        supervised=np.frombuffer(b"".join(chunk.supervised for chunk in chunks), np.uint8),
        rows=rows,
        meta={"counts": counts, "rejected": rejected, "files": files,
              "by_line": [any(c.by_line for c in sample.chunks)] * len(files)},
    )  # fmt: skip
    fitted, _ = fit(index, store, data)
    # Of which drawn row each fitted one is a part.
    records = rows[np.searchsorted(store.starts, fitted["start"])]
    _, drawn = np.unique(records[["file", "number"]], return_inverse=True)
    tokens, parts = (
        np.concatenate([found, np.zeros(sample.num_drawn - len(found))])
        for found in (np.bincount(drawn, fitted["length"]), np.bincount(drawn).astype(np.float64))
    )
    return SampledSource(source, sample, NamedStore(name, store), fitted, tokens, parts)


def _chosen(
    sources: Sequence[SampledSource], data: DataConfig, side: Side, run_seed: int, seed: int
) -> tuple[Selection, float]:
    """An epoch in small, and how many times as large it is: what training would choose, where all rows are here."""
    configs, stores = [source.config for source in sources], [source.named for source in sources]
    if all(source.sample.is_whole for source in sources):
        return choose_rows(stores, configs, data, key=f"data.{side}", side=side, seed=run_seed), 1.0
    for source in sources:
        if not len(source.fitted):
            raise DataError(
                f"data.{side}: none of {source.sample.num_drawn:,} rows that were drawn of {source.config.path} is "
                f"left after data.over_length={data.over_length}",
                fix=f"raise data.max_seq_len above {data.max_seq_len}, or shorten the prompts",
            )
    kept = 1.0 if data.eval_split is None else 1 - data.eval_split.share
    sizes = [source.num_tokens if data.mix_by == "tokens" else source.num_fitted for source in sources]
    weights = np.array(weights_of(configs, sizes))
    seen = float(weights @ np.array([source.num_fitted * kept for source in sources]))
    scale = max(1.0, seen / MAX_PACKED_ROWS)
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    drawn = [_grown(source.fitted, source.num_fitted * kept / scale, rng) for source in sources]
    counts: Counts = {source.named.name: Counter() for source in sources}
    rows = np.concatenate(mix(drawn, configs, data, run_seed, counts))
    if not len(rows):
        raise DataError(f"data.{side}: the weights draw no row", fix="raise the weight of a source")
    return Selection(rows, pack(rows, data), counts), seen / len(rows)


def _grown(rows: ChosenRows, number: float, rng: np.random.Generator) -> ChosenRows:
    """``number`` rows in any order, each of ``rows`` as often as the others, or once less."""
    count = max(1, round(number))
    whole, rest = divmod(count, len(rows))
    chosen = np.concatenate([np.tile(np.arange(len(rows)), whole), rng.permutation(len(rows))[:rest]])
    grown: ChosenRows = rows[rng.permutation(chosen)]
    return grown


def _evaluated(sources: Sequence[SampledSource], data: DataConfig, run_seed: int) -> tuple[float, float]:
    """Rows and tokens of the evaluation set."""
    if all(source.sample.is_whole for source in sources):
        configs, stores = [source.config for source in sources], [source.named for source in sources]
        rows = choose_rows(stores, configs, data, key="data.eval", side="eval", seed=run_seed).rows
        return float(len(rows)), float(rows["length"].sum(dtype=np.int64))
    share = 1.0 if data.eval_split is None else data.eval_split.share
    return share * sum(s.num_fitted for s in sources), share * sum(s.num_tokens for s in sources)


def _interval(sources: Sequence[SampledSource], data: DataConfig, value: float, *, seed: int) -> Range:
    """Nine of ten resamples of the drawn rows have as many tokens (bootstrap, Efron 1979), relative to ``value``.

    What is known of a source that was drawn in part varies less: by the finite population correction sqrt(1 - n / N).
    """
    if all(source.sample.is_whole for source in sources):
        return Range(value, value, value)
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    tokens, rows = (np.zeros((len(sources), NUM_RESAMPLES)) for _ in range(2))
    for index, source in enumerate(sources):
        drawn = len(source.tokens)
        correction = np.sqrt(max(0.0, 1 - drawn / source.sample.num_rows))
        number = source.sample.num_rows * (1 + source.sample.count_error * rng.standard_normal(NUM_RESAMPLES))
        chosen = rng.integers(drawn, size=(NUM_RESAMPLES, drawn))
        for sums, values in ((tokens, source.tokens), (rows, source.parts)):
            mean = values.mean()
            sums[index] = np.maximum(number * (mean + correction * (values[chosen].mean(1) - mean)), 1.0)
    configs = [source.config for source in sources]
    by = tokens if data.mix_by == "tokens" else rows
    resampled = [weights_of(configs, by[:, n].tolist()) for n in range(NUM_RESAMPLES)]
    totals = (np.array(resampled).T * tokens).sum(0)
    sizes = [s.num_tokens if data.mix_by == "tokens" else s.num_fitted for s in sources]
    expected = float(np.array(weights_of(configs, sizes)) @ [s.num_tokens for s in sources])
    low, high = np.quantile(totals, [0.05, 0.95]) / expected * value
    return Range(value, min(value, float(low)), max(value, float(high)))


def _lost_share(sources: Sequence[SampledSource]) -> float:
    """Of the tokens that the rows of all sources have."""
    rows = [source.sample.num_rows / source.sample.num_drawn for source in sources]
    read = sum(n * float(s.named.store.rows["length"].sum(dtype=np.int64)) for n, s in zip(rows, sources, strict=True))
    return max(0.0, 1 - sum(source.num_tokens for source in sources) / read) if read else 0.0


def _told(sources: Sequence[SampledSource]) -> str:
    samples = [source.sample for source in sources]
    drawn, rows = sum(sample.num_drawn for sample in samples), sum(sample.num_rows for sample in samples)
    if all(sample.is_whole for sample in samples):
        return f"all {drawn:,} rows tokenised"
    about = "about " if any(sample.count_error for sample in samples) else ""
    beginning = sum(sample.from_beginning for sample in samples)
    where = f"; of {beginning} file{'s' if beginning > 1 else ''} only the beginning was read" if beginning else ""
    return f"{drawn:,} of {about}{rows:,.0f} rows tokenised{where}"
