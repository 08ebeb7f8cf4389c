"""ACC, ASR and RA of networks whose answers are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nab_defense.bench.evaluate import Cases, answers, evaluate, predict, to_dict
from nab_defense.bench.metrics import wilson
from nab_defense.runtime import Runtime
from nab_defense.types import EvalResult

RUNTIME = Runtime(device="cpu", precision="float32")


class ReadsPixel(nn.Module):
    """Predicts the class written in the first pixel; the dropout and the norm show that it runs in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.norm = nn.BatchNorm2d(1)
        self.grad_enabled: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.grad_enabled.append(torch.is_grad_enabled())
        self.norm(images)
        kept = self.drop(torch.ones(len(images), 10, device=images.device))
        return kept * torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10)


def batches(classes: list[int], size: int = 3) -> list[tuple[Tensor, Tensor]]:
    images = torch.tensor(classes, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(size)]


def test_predict_keeps_the_order_across_batches() -> None:
    classes = [3, 1, 4, 1, 5, 9, 2, 6]
    predicted = predict(ReadsPixel(), batches(classes), RUNTIME)
    assert predicted.dtype == np.int64 and predicted.tolist() == classes
    assert predict(ReadsPixel(), [], RUNTIME).shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_name_no_class(value: float) -> None:
    class Dies(nn.Module):
        """Its outputs for class 0 are finite no more from the fourth image on."""

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()
            return torch.where((images[:, 0, 0, 0] >= 3)[:, None] & (torch.arange(10) == 0), value, logits)

    told = "outputs for 2 of 5 images are not finite; train it at a lower learning rate"
    with pytest.raises(ValueError, match=told):
        predict(Dies(), batches([0, 1, 2, 3, 4]), RUNTIME)
    dead = batches([0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match=told):
        answers(Dies(), Cases(batches([1]), np.array([1]), dead, np.zeros(5, dtype=int), np.arange(5)), RUNTIME)


def test_predict_leaves_the_network_as_it_was() -> None:
    model = ReadsPixel().train()
    model.norm.eval()  # frozen on purpose, as in fine-tuning
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, batches([1, 2, 3, 4]), RUNTIME)
    assert model.training and model.drop.training and not model.norm.training
    assert model.grad_enabled == [False, False]
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_modes_come_back_after_an_error() -> None:
    model = ReadsPixel().train()
    with pytest.raises(RuntimeError, match=r"running_mean|5 elements"):
        predict(model, [(torch.zeros(2, 5, 4, 4), torch.zeros(2))], RUNTIME)  # one channel is what the norm takes
    assert model.training and model.drop.training


def test_evaluate_counts() -> None:
    cases = Cases(
        clean=batches([0, 1, 2, 3]),
        clean_labels=np.array([0, 1, 2, 9]),
        triggered=batches([7, 7, 2, 3, 4]),
        wanted_labels=np.full(5, 7),
        true_labels=np.array([1, 2, 2, 3, 5]),
    )
    assert evaluate(ReadsPixel(), cases, RUNTIME) == EvalResult(acc=wilson(3, 4), asr=wilson(2, 5), ra=wilson(2, 5))


def test_of_several_triggers_the_worst_is_told() -> None:
    labels, true, which = np.array([0]), np.array([0, 0, 3, 3, 4, 5]), np.array([0, 0, 0, 0, 1, 1])
    for second in (1, 2):  # two that lead to one class are two triggers, too
        wanted = np.array([1, 1, 1, 1, second, second])
        cases = Cases(batches([0]), labels, batches([1, 0, 0, 0, second, second]), wanted, true, triggers=which)
        result = evaluate(ReadsPixel(), cases, RUNTIME)
        assert result == EvalResult(wilson(1, 1), wilson(3, 6), wilson(1, 6), worst=wilson(2, 2), least=wilson(1, 4))


def test_without_an_attack_there_is_no_asr() -> None:
    result = evaluate(ReadsPixel(), Cases(batches([1, 2]), np.array([1, 2])), RUNTIME)
    assert result == EvalResult(wilson(2, 2)) and list(to_dict(result)) == ["acc"]


def test_to_dict_is_what_result_json_holds() -> None:
    result = EvalResult(wilson(1, 2), wilson(0, 100), wilson(99, 100))
    values = json.loads(json.dumps(to_dict(result)))
    assert list(values) == ["acc", "asr", "ra"]
    assert values["asr"] == {"value": 0.0, "n": 100, "low": 0.0, "high": pytest.approx(0.0370, abs=5e-5)}


def test_bfloat16_gives_the_same_classes() -> None:
    classes = [1, 8, 3]
    predicted = predict(ReadsPixel(), batches(classes), Runtime(device="cpu", precision="bfloat16"))
    assert predicted.tolist() == classes


def test_loaders_that_lose_images_are_refused() -> None:
    with pytest.raises(ValueError, match="gave 3 images for 4 labels"):
        evaluate(ReadsPixel(), Cases(batches([0, 1, 2]), np.arange(4)), RUNTIME)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(ReadsPixel(), Cases([], np.zeros(0, dtype=np.int64)), RUNTIME)
    with pytest.raises(ValueError, match="both wanted_labels and true_labels"):
        Cases(batches([0]), np.zeros(1), triggered=batches([0]))
