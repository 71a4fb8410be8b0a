import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "autograd_tour.py"
X = [-0.9484, 0.2716, 0.3606]


@pytest.fixture(scope="module")
def tour() -> ModuleType:
    specification = importlib.util.spec_from_file_location("autograd_tour", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def shown(tour: ModuleType, capsys: pytest.CaptureFixture[str]):
    """Runs one idea, and returns what it printed as {label: text}."""

    def run(name: str) -> dict[str, str]:
        tour.main(["--only", name])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
        return dict(re.split(r"\s{2,}|(?<=.{34}) ", line.strip(), maxsplit=1) for line in lines if "  " in line.strip())

    return run


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_requires_grad(shown) -> None:
    values = shown("requires_grad")
    assert values["first.requires_grad"] == values["second.requires_grad"] == "False"
    assert values["after requires_grad_()"] == "True"
    assert values["first.grad before any pass"] == values["first.grad_fn, it is a leaf"] == "None"
    assert values["product.grad_fn"] == "MulBackward0"
    assert values["mean.grad_fn"] == "MeanBackward0"
    assert values["first.grad = second / 6"] == "[[1.1667, 1.3333, 1.5000], [1.6667, 1.8333, 2.0000]]"
    assert values["its shape is first's"] == "True"
    assert values["second.grad"] == "None"


def test_graph(shown) -> None:
    values = shown("graph")
    assert values["nodes, edges"] == "[5, 4]"
    assert values["loss.grad_fn.next_functions"] == "[AddBackward0]"
    assert values["weight.is_leaf, hidden.is_leaf"] == "[True, False]"
    assert values["hidden.grad, retained: 2 · hidden"] == "14.0000"
    assert values["weight.grad: 2 · hidden · 2"] == "28.0000"
    assert values["bias.grad: 2 · hidden · 1"] == "14.0000"


def test_a_node_used_twice_is_one_node_with_two_edges(tour: ModuleType) -> None:
    x = torch.ones((), requires_grad=True)
    nodes, edges = tour.walk((x * x).grad_fn)
    assert [tour.name_of(node) for node in nodes] == ["MulBackward0", "AccumulateGrad (a leaf)"]
    assert len(edges) == 2
    assert tour.text_tree((x * 2).grad_fn) == ["MulBackward0", "   AccumulateGrad (a leaf)", "   ·"]


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graph_is_drawn_where_graphviz_is_there(tour: ModuleType, tmp_path: Path) -> None:
    tour.main(["--only", "graph", "--picture", str(tmp_path / "new" / "graph.svg")])
    assert "AccumulateGrad" in (tmp_path / "new" / "graph.svg").read_text()


def test_without_graphviz_the_text_says_so(tour: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tour.main(["--only", "graph", "--picture", str(tmp_path / "graph.svg")])
    assert "as text, for graphviz's `dot` is not installed" in capsys.readouterr().out
    assert not (tmp_path / "graph.svg").exists()


def test_no_grad(shown) -> None:
    values = shown("no_grad")
    assert values["in the block"] == values["as a decorator"] == "False"
    assert values["enable_grad inside it"] == values["outside again"] == "True"
    assert values["is_inference: no_grad, inference"] == "[False, True]"
    assert "Inference tensors cannot be saved for backward" in values["inference_mode's result"]


def test_detach(shown) -> None:
    values = shown("detach")
    assert values["(a + b).mean()"] == "7.0000"
    assert values["a.grad"] == values["b.grad"] == "[[0.2500, 0.2500], [0.2500, 0.2500]]"
    assert values["a.detach().requires_grad"] == "False"
    assert values["a.grad after (a + a.detach())"] == "[[0.5000, 0.5000], [0.5000, 0.5000]]"


def test_variable(shown) -> None:
    values = shown("variable")
    assert values["product"] == "27.0000"
    assert (values["w1.grad = var"], values["var.grad = w1"], values["w2.grad, unused"]) == (
        "9.0000",
        "3.0000",
        "None",
    )


def test_chain_rule(shown) -> None:
    values = shown("chain_rule")
    assert numbers(values["x"]) == X
    assert numbers(values["x.grad"]) == numbers(values["4y/3 by hand"]) == [1.4022, 3.0288, 3.1474]


def test_vector_jacobian(shown) -> None:
    values = shown("vector_jacobian")
    assert "grad can be implicitly created only for scalar outputs" in values["backward() without v"]
    assert numbers(values["x.grad: the mean's plus vᵀJ"]) == [1.8228, 12.1151, 3.1569]
    assert values["4y/3 + vᵀJ"] == values["x.grad: the mean's plus vᵀJ"]
    # J is diagonal, 4y on it
    assert numbers(values["J by torch.func.jacrev"])[::4] == pytest.approx([4 * (x + 2) for x in X], abs=2e-4)
    assert numbers(values["vᵀJ by hand"]) == pytest.approx([0.4207, 9.0863, 0.0094])


def test_accumulation(shown) -> None:
    values = shown("accumulation")
    for epoch, total in ((1, 3.0), (2, 6.0), (3, 9.0)):
        assert numbers(values[f"epoch {epoch}"]) == [total] * 4
        assert numbers(values[f"epoch {epoch}, with grad.zero_()"]) == [3.0] * 4


def test_optimizer_step(shown) -> None:
    values = shown("optimizer_step")
    assert all(numbers(values[f"epoch {epoch}, gradient"]) == [3.0] * 4 for epoch in (1, 2, 3))
    assert numbers(values["weights: 1 − 3 · 0.01 · 3"]) == [0.91] * 4
    assert values["after zero_grad()"] == "None"
    assert numbers(values["after set_to_none=False"]) == [0.0] * 4


def test_gradient_descent_is_the_same_four_ways_to_the_bit(tour: ModuleType) -> None:
    weight, bias = tour.by_hand()
    assert weight.abs().min() > 0.5  # it moved
    for other in (
        tour.by_optimizer(),
        tour.by_lightning("manual"),
        tour.by_lightning("automatic"),
    ):
        assert torch.equal(other[0], weight)
        assert torch.equal(other[1], bias)


def test_gradient_descent_shows_all_four(shown) -> None:
    values = shown("gradient_descent")
    assert values["equal to the bit"] == "True"
    assert len({values[way] for way in ("by hand", "torch.optim.SGD", "model=manual", "model=automatic")}) == 1


def test_learning_rates_fall_and_rise_about_the_limit(shown) -> None:
    values = shown("learning_rates")
    sharpness, limit = numbers(values["λ"])[0], numbers(values["limit, 2/λ"])[0]
    assert limit == pytest.approx(2 / sharpness, abs=1e-4)
    least = numbers(values["least loss of any line"])[0]
    losses = {label.partition(":")[0]: numbers(text) for label, text in values.items() if "loss" in text}
    assert losses["too small"][1] > 0.5 * losses["too small"][0]
    assert losses["right"][1] == pytest.approx(least, rel=0.01)
    assert losses["too large"][1] > 1000 * losses["too large"][0]


def test_mistakes_are_shown_with_their_remedies(shown) -> None:
    in_place, freed, double = shown("in_place"), shown("freed_graph"), shown("double_backward")
    assert "a leaf Variable that requires grad" in in_place["weights += 1"]
    assert "modified by an inplace operation" in in_place["exp, edited before backward"]
    assert numbers(in_place["remedy: a new tensor"]) == pytest.approx([2 * torch.e**2] * 3, abs=1e-4)
    assert "backward through the graph a second time" in freed["backward() again"]
    assert freed["remedy: retain_graph=True, 6 + 6"] == "12.0000"
    assert "does not require grad" in double["the slope's own gradient"]
    assert double["its own gradient, 6x"] == "12.0000"


def test_a_mistake_that_is_none_is_noticed(tour: ModuleType) -> None:
    with pytest.raises(AssertionError, match="fine: no error"), tour.mistake("fine"):
        pass


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_whole_tour_runs_as_a_script_without_a_word_on_stderr() -> None:
    result = run()
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.count(" · ") >= 14


def test_list_shows_each_idea_once(tour: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tour.main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(tour.IDEAS)


def test_several_ideas_run_in_the_order_asked_for(tour: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tour.main(["--only", "detach", "variable"])
    out = capsys.readouterr().out
    assert out.index("detach ·") < out.index("variable ·")
    assert "accumulation ·" not in out


def test_unknown_idea_is_refused_with_the_nearest() -> None:
    result = run("--only", "acumulation")
    assert result.returncode == 1
    assert result.stderr == "error: `acumulation` is not an idea of the tour. Did you mean `accumulation`?\n"
    assert result.stdout == ""


def test_a_notebook_runs_each_cell_as_it_is_reached(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    cells = SCRIPT.read_text().split("# %%\n")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in cells[:3]:  # the header, the imports, the first idea
        exec(cell, namespace)
    assert "MeanBackward0" in capsys.readouterr().out
