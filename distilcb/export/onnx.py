"""A model's folder -> ONNX, and dynamically quantised int8, each run and compared with PyTorch before it counts.

<folder>/onnx/model.onnx, model_int8.onnx: where the hub and optimum look for them.
"""

import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilcb.errors import ConfigError, ModelError, first_line, writing
from distilcb.models.families import family_of
from distilcb.models.loading import load_any_model

log = logging.getLogger(__name__)

ONNX, INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"
_LARGEST_ERROR = 1e-3
_MUCH_FOR_INT8 = 1.0
"""standard deviations of the logits: from here on it is told that int8 is another model"""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OPSET = 18
_EXTRA = "pip install 'distilcb[onnx]'"


class OnnxModel:
    """An ONNX file that is run by onnxruntime on this machine's CPU."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """Raises ConfigError without onnxruntime, ModelError for a file that it cannot read."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(f"{path} needs onnxruntime: {_EXTRA}.") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # With it each session keeps what its largest pass took: 2 GB of 32 texts of 256 tokens at the published size.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside others that are timed
        if threads:
            options.intra_op_num_threads = threads
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class but this one
            raise ModelError(f"{path} cannot be run ({first_line(error)}). Export it again.") from error

    def run(self, ids: Tensor, seen: Tensor | None = None, segments: Tensor | None = None) -> list[Tensor]:
        """The logits, of questions the first and last places', of (texts, tokens) ids.

        Args:
            seen: 0 where there is padding, as transformers' attention_mask.
            segments: transformers' token_type_ids, for models that know several; None: the first one.

        Raises:
            ModelError: a file that wants other inputs, or more memory than there is.
        """
        values = (
            ids,
            torch.ones_like(ids) if seen is None else seen,
            torch.zeros_like(ids) if segments is None else segments,
        )
        known = {each.name for each in self._session.get_inputs()}
        feed = {name: value.numpy() for name, value in zip(_INPUTS, values, strict=True) if name in known}
        try:
            return [torch.from_numpy(each) for each in self._session.run(None, feed)]
        except Exception as error:  # as above
            raise ModelError(
                f"{self._path} cannot be run on {len(ids)} x {ids.shape[-1]} tokens ({first_line(error)}). If "
                "launch/export.py did not make it, export it again; where memory ran out, ask for less at once."
            ) from error


def export_onnx(folder: Path, *, int8: bool) -> dict[str, Any]:
    """Write <folder>/onnx/model.onnx, and model_int8.onnx if wanted; {"onnx": facts, "int8": facts}.

    Inputs are ids and mask, and segments where the model knows several.

    Facts: "bytes"; "largest_error" of a logit beside PyTorch's, and "error", the same in their standard deviations;
    "agreement", the share of places where both choose the same, where there is a choice. An int8 of an earlier export
    goes where none is wanted.

    Args:
        folder: a Hugging Face folder of any supported family, language model or fine-tuned.

    Raises:
        ConfigError: onnx or onnxruntime is not installed, or a disk is full.
        ModelError: a model that cannot be exported, or whose ONNX gives other logits than PyTorch, or logits of int8
            that are no numbers.
    """
    _check_installed()
    model = load_any_model(str(folder)).eval()
    if family_of(model.config, where=str(folder)).causal:
        model.config.use_cache = False
    cases = _cases(model)
    found: dict[str, Any] = {}
    with writing(folder, ConfigError, "Free some space and run the same command again."):
        (folder / ONNX).parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx.") as work:
            plain = Path(work) / "model.onnx"
            _write_plain(model, plain)
            found["onnx"] = _compare(model, plain, cases)
            if not found["onnx"]["largest_error"] <= _LARGEST_ERROR:
                raise ModelError(
                    f"{folder}: its ONNX gives logits that differ by {found['onnx']['largest_error']:.3g} from "
                    f"PyTorch's, at most {_LARGEST_ERROR} was expected. Nothing was written."
                )
            if int8:
                small = Path(work) / "model_int8.onnx"
                _quantise(plain, small)
                found["int8"] = _compare(model, small, cases)
                _check_int8(folder, found["int8"])
                small.replace(folder / INT8)
            else:
                (folder / INT8).unlink(missing_ok=True)
            plain.replace(folder / ONNX)
    return found


def _check_int8(folder: Path, facts: dict[str, Any]) -> None:
    """How much int8 may cost nobody can say but its user; that it costs much is told."""
    if not math.isfinite(facts["error"]):
        raise ModelError(f"{folder}: logits of its int8 are no numbers. Nothing was written; leave --int8 out.")
    if facts["error"] > _MUCH_FOR_INT8:
        log.warning(
            "%s differs from PyTorch's logits by up to %.2f of their standard deviation: measure it on your task "
            "before you use it",
            folder / INT8,
            facts["error"],
        )


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--onnx needs {error.name}: {_EXTRA}.") from error


def _outputs(model: Any) -> list[str]:
    return ["start_logits", "end_logits"] if "QuestionAnswering" in type(model).__name__ else ["logits"]


def _inputs(model: Any) -> tuple[str, ...]:
    """Ids and mask; of BERT segments too, which its tokenizer makes of pairs of texts, and no other family's does."""
    several = model.config.model_type == "bert" and model.config.type_vocab_size > 1
    return _INPUTS if several else _INPUTS[:2]


class _Logits(torch.nn.Module):
    """The model with two inputs, or three, and its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(_inputs(self.model), inputs, strict=True)))
        return tuple(found[name] for name in _outputs(self.model))


def _write_plain(model: Any, path: Path) -> None:
    """With any number of texts and tokens, in one file."""
    texts, tokens = torch.export.Dim("texts", min=1), torch.export.Dim("tokens", min=2)
    ids, names = torch.full((2, 8), 9), list(_inputs(model))
    values = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(names)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that inputs have their sizes in common
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                values,
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                input_names=names,
                output_names=_outputs(model),
                dynamic_shapes=(tuple({0: texts, 1: tokens} for _ in names),),
            )
        program.save(path, external_data=False)
    except (RuntimeError, ValueError, TypeError) as error:  # torch.onnx.OnnxExporterError is a RuntimeError
        raise ModelError(f"this {model.config.model_type} cannot be written as ONNX: {first_line(error)}") from error


def _quantise(plain: Path, small: Path) -> None:
    """Weights of matrix products and embeddings in int8; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = plain.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(small), weight_type=QuantType.QInt8, per_channel=True, reduce_range=False)


def _cases(model: Any) -> list[tuple[Tensor, ...]]:
    """Inputs: one text, several of another length with padding, and the longest; of segments the later half's second.

    A model of several segments has the first case once more, in the first segment alone, as text without pairs has.
    """
    family = family_of(model.config, where="model")
    longest = family.max_seq_len(model.config)
    generator = torch.Generator().manual_seed(0)
    found = []
    for texts, tokens in ((1, 5), (3, 17), (1, longest)):
        ids = torch.randint(10, model.config.vocab_size, (texts, min(tokens, longest)), generator=generator)
        seen = torch.ones_like(ids)
        if texts > 1:
            seen[0, 7:] = 0
            if model.config.pad_token_id is not None:
                ids[0, 7:] = model.config.pad_token_id
        segments = torch.zeros_like(ids)
        segments[:, ids.shape[1] // 2 :] = 1
        found.append((ids, seen, segments)[: len(_inputs(model))])
    if len(_inputs(model)) > 2:
        found.append((*found[0][:2], torch.zeros_like(found[0][0])))
    return found


@torch.no_grad()
def _compare(model: Any, path: Path, cases: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    onnx, plain = OnnxModel(path), _Logits(model)
    by_token = not any(kind in type(model).__name__ for kind in ("SequenceClassification", "QuestionAnswering"))
    errors, logits, same = [], [], []
    for inputs in cases:
        ids, seen = inputs[:2]
        for exact, found in zip(plain(*inputs), onnx.run(*inputs), strict=True):
            if by_token:  # what stands at padding is nobody's
                exact, found = exact[seen.bool()], found[seen.bool()]
            elif exact.shape == ids.shape:  # places of an answer
                exact, found = (each.masked_fill(~seen.bool(), -1e4) for each in (exact, found))
            errors.append((found - exact).abs().max())
            logits.append(exact[exact > -1e4])
            same.append((found.argmax(-1) == exact.argmax(-1)).float().flatten())
    largest = float(torch.stack(errors).max())  # NaN where one is, which Python's max may pass over
    facts = {"bytes": path.stat().st_size, "largest_error": largest}
    facts["error"] = largest / float(torch.cat(logits).std())
    if exact.shape[-1] > 1:
        facts["agreement"] = float(torch.cat(same).mean())
    return facts
