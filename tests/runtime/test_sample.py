"""The text at the end of a run is what its last checkpoint gives, however many ranks hold the weights."""

import pytest

from seqtrain.runtime.generate import Continuation, continue_text
from seqtrain.runtime.loading import open_run
from seqtrain.runtime.resolving import resolve
from tests.runtime.runtime_cases import BETAS, change, folder_of, grid, in_tiers, outcome, small_config, train_on

SHORT = {"train": {"steps": 3, "sequence_length": 32, "batch_size": 8, "micro_batch_size": 2}}
LAYERS = ("gated_delta_net", "attention")
CASES = {
    "pieces": {"parallel": grid(1, 2, 3)},
    "averages": {
        "parallel": grid(2, 1, 2),
        "optimizer": {"name": "schedule_free", "betas": BETAS},
        "schedule": {"name": "constant", "warmup_fraction": 0.0},
    },
    "rounded": {
        "parallel": grid(2, 1, 2),
        "train": {**SHORT["train"], "dtype": "bfloat16", "weights": "bfloat16"},
    },
    "layers": {"parallel": {"data": 1, "tensor": 2}},
    "experts": {"parallel": {"data": 2, "experts": 2}, "model": {"experts": 4, "experts_per_token": 2}},
}


@pytest.mark.parametrize("names", in_tiers(["pieces"], ["averages", "rounded", "layers", "experts"]))
def test_ranks_write_what_generate_would(tmp_path, names):
    first = small_config(tmp_path, *LAYERS, **SHORT, sample={"prompt": "state", "tokens": 24})
    configs = {name: resolve(change(first, name, **CASES[name])) for name in names}
    train_on(*configs.values())
    for name, config in configs.items():
        _, model, tokenizer = open_run(folder_of(config).path)
        wish = Continuation(config.sample.prompt, config.sample.tokens, config.seed)
        text = continue_text(model, tokenizer, wish, backend=config.kernels.backend)
        assert len(text) > 20
        assert outcome(config)["sample"] == text, name
