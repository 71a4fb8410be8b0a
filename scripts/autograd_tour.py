# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %%
"""The ideas of autograd, one by one, with their numbers.

Runs as a script (`--list` shows the ideas, `--only accumulation` runs one), and opens as a notebook in VS
Code and Jupytext: there each cell runs as it is reached.
"""

# torch leaves backward() without types.
# mypy: disable-error-code="no-untyped-call"
import argparse
import builtins
import contextlib
import difflib
import logging
import shutil
import subprocess
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from downslope.runs.console import refusing

IDEAS: dict[str, Callable[[], None]] = {}
PICTURE: Path | None = None  # where the idea `graph` draws to: --picture


def idea(function: Callable[[], None]) -> Callable[[], None]:
    """Registers an idea under its function's name; a notebook runs it at once."""
    IDEAS[function.__name__] = function
    if hasattr(builtins, "__IPYTHON__"):
        run(function.__name__)
    return function


def run(name: str) -> None:
    """Prints an idea's title and prose, then what it shows."""
    title, _, prose = (IDEAS[name].__doc__ or "").partition("\n")
    print(f"\n{name} · {title}\n")
    print(textwrap.indent(textwrap.dedent(prose).strip(), "  "), end="\n\n")
    IDEAS[name]()


def show(label: str, value: object) -> None:
    """Prints one value beside what it is: tensors as plain lists, numbers with four decimals."""
    print(f"    {label:<34} {_plain(value.tolist() if isinstance(value, Tensor) else value)}")


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(each) for each in value)}]"
    return str(value)


@contextlib.contextmanager
def mistake(label: str) -> Iterator[None]:
    """Shows the first sentence of the error that the block must raise."""
    try:
        yield
    except RuntimeError as error:
        sentence = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        show(label, f"{type(error).__name__}: {textwrap.shorten(sentence, 120, placeholder=' …')}")
    else:
        raise AssertionError(f"{label}: no error")


# %%
@idea
def requires_grad() -> None:
    """A tensor tracks nothing until it is asked to.

    `requires_grad` is False by default. Switched on, every operation leaves a note of itself in `grad_fn`,
    and `backward()` follows the notes back to the tensors that began it all, the leaves. There, and only
    there, it puts d(result) / d(leaf) into `.grad`, in the leaf's own shape.
    """
    first = torch.Tensor([[1, 2, 3], [4, 5, 6]])
    second = torch.Tensor([[7, 8, 9], [10, 11, 12]])
    show("first.requires_grad", first.requires_grad)
    show("second.requires_grad", second.requires_grad)
    first.requires_grad_()
    show("after requires_grad_()", first.requires_grad)
    show("first.grad before any pass", first.grad)
    show("first.grad_fn, it is a leaf", first.grad_fn)

    product = first * second
    mean = product.mean()
    show("product.grad_fn", type(product.grad_fn).__name__)
    show("mean.grad_fn", type(mean.grad_fn).__name__)

    mean.backward()
    assert first.grad is not None
    show("first.grad = second / 6", first.grad)
    show("its shape is first's", first.grad.shape == first.shape)
    show("second.grad", second.grad)


# %%
@idea
def graph() -> None:
    """The notes form a graph: operations are its nodes, `next_functions` its edges.

    It hangs together from the result down to the leaves, whose node, AccumulateGrad, does the adding to
    `.grad`. An intermediate result is no leaf: its gradient passes through, and stays only if `retain_grad`
    asks for it.
    """
    weight = torch.tensor(3.0, requires_grad=True)
    bias = torch.tensor(1.0, requires_grad=True)
    hidden = weight * 2 + bias
    loss = hidden**2
    print(textwrap.indent("\n".join(text_tree(loss.grad_fn)), "    "))
    nodes, edges = walk(loss.grad_fn)
    show("loss.grad_fn.next_functions", parts_of(loss.grad_fn))
    show("hidden.grad_fn.next_functions", parts_of(hidden.grad_fn))
    show("nodes, edges", (len(nodes), len(edges)))
    show("drawn", draw(nodes, edges, PICTURE) if PICTURE else "as text; --picture graph.svg draws it")

    hidden.retain_grad()
    loss.backward()
    show("weight.is_leaf, hidden.is_leaf", (weight.is_leaf, hidden.is_leaf))
    show("hidden.grad, retained: 2 · hidden", hidden.grad)
    show("weight.grad: 2 · hidden · 2", weight.grad)
    show("bias.grad: 2 · hidden · 1", bias.grad)


def text_tree(node: Any, indent: str = "") -> list[str]:
    """Returns the graph below a node, one operation a line."""
    if node is None:  # a constant: nothing to differentiate
        return [f"{indent}·"]
    below = (line for child, _ in node.next_functions for line in text_tree(child, indent + "   "))
    return [f"{indent}{name_of(node)}", *below]


def parts_of(node: Any) -> list[str]:
    """Returns the names of what an operation's result was made of."""
    return [name_of(child) for child, _ in node.next_functions]


def name_of(node: Any) -> str:
    """Returns an operation's name without its namespace."""
    name: str = node.name().rpartition("::")[2]
    return f"{name} (a leaf)" if name == "AccumulateGrad" else name


def walk(root: Any) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Returns the nodes below a node, itself first, and the edges, from results to their parts."""
    nodes, edges = [root], []
    for node in nodes:  # grows while it is walked
        for child, _ in node.next_functions:
            if child is not None:
                edges.append((node, child))
                if child not in nodes:
                    nodes.append(child)
    return nodes, edges


def draw(nodes: list[Any], edges: list[tuple[Any, Any]], path: Path) -> str:
    """Draws the graph with graphviz, as the path's suffix says; returns what came of it."""
    names = {node: f"n{index}" for index, node in enumerate(nodes)}
    lines = [f'{names[node]} [shape=box, fontname="sans-serif", label="{name_of(node)}"]' for node in nodes]
    lines += [f"{names[result]} -> {names[part]}" for result, part in edges]
    if shutil.which("dot") is None:
        return "as text, for graphviz's `dot` is not installed"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["dot", f"-T{path.suffix.removeprefix('.') or 'svg'}", "-o", str(path)]
    drawn = subprocess.run(
        command, input=f"digraph {{{'; '.join(lines)}}}", text=True, capture_output=True, check=False
    )
    return str(path) if drawn.returncode == 0 else f"as text, for dot says: {drawn.stderr.strip()}"


# %%
@idea
def no_grad() -> None:
    """Where no gradient is wanted, take no notes: it saves time and memory.

    `no_grad` works as a block and as a decorator, and `enable_grad` switches back on inside it.
    `inference_mode` goes further: its tensors can never enter a graph again, and so even their bookkeeping is
    spared.
    """
    x = torch.ones(2, requires_grad=True)

    @torch.no_grad()
    def predict(inputs: Tensor) -> Tensor:
        return inputs * 2

    with torch.no_grad():
        show("in the block", (x * 2).requires_grad)
        with torch.enable_grad():
            show("enable_grad inside it", (x * 2).requires_grad)
    show("as a decorator", predict(x).requires_grad)
    show("outside again", (x * 2).requires_grad)

    with torch.no_grad():
        constant = x * 2
    with torch.inference_mode():
        inference = x * 2
    show("is_inference: no_grad, inference", (constant.is_inference(), inference.is_inference()))
    (x * constant).sum().backward()
    show("no_grad's result as a constant", x.grad)
    with mistake("inference_mode's result"):
        x * inference
    show("remedy: a clone of it", (x * inference.clone()).requires_grad)


# %%
@idea
def detach() -> None:
    """`detach()` gives the same numbers without their history.

    What is computed from the detached tensor counts as a constant. Below, the second pass reaches `a` along
    one of two ways only, and adds its 0.25 to the 0.25 that is already there.
    """
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    b = torch.tensor([[3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    mean = (a + b).mean()
    mean.backward()
    show("(a + b).mean()", mean)
    show("a.grad", a.grad)
    show("b.grad", b.grad)
    show("a.detach().requires_grad", a.detach().requires_grad)
    (a + a.detach()).mean().backward()
    show("a.grad after (a + a.detach())", a.grad)


# %%
@idea
def variable() -> None:
    """`Variable`, in old tutorials: tensors have replaced it.

    Before PyTorch 0.4 a tensor had to be wrapped in a Variable to be tracked. Today `Variable(t)` returns a
    tensor; write `torch.tensor(…, requires_grad=True)` instead. A leaf that the result does not use keeps
    None.
    """
    from torch.autograd import Variable

    var = Variable(torch.tensor(9.0), requires_grad=True)
    w1 = Variable(torch.tensor(3.0), requires_grad=True)
    w2 = Variable(torch.tensor(5.0), requires_grad=True)
    product = var * w1
    product.backward()
    show("type(var)", type(var).__name__)
    show("product", product)
    show("w1.grad = var", w1.grad)
    show("var.grad = w1", var.grad)
    show("w2.grad, unused", w2.grad)


# %%
@idea
def chain_rule() -> None:
    """Through y = x + 2 and z = 2y² to their mean: dz̄/dxᵢ = 4yᵢ/3.

    `backward()` multiplies the local derivatives on the way back: 1/3 of the mean, 4y of z, 1 of y.
    """
    x = torch.tensor(X, requires_grad=True)
    y = x + 2
    z = 2 * y**2
    z.mean().backward()
    show("x", x)
    show("x.grad", x.grad)
    show("4y/3 by hand", 4 * (x + 2) / 3)


# The course drew x at random and printed four digits. Its gradients need the fifth: with −0.9484 the first of
# them would be 1.4021.
X = [-0.94837, 0.27158, 0.36057]


# %%
@idea
def vector_jacobian() -> None:
    """A vector has no gradient but a Jacobian; `backward(v)` computes vᵀJ.

    Of z there are three numbers, each with a gradient of its own: together the Jacobian, J. Autograd never
    builds it. It takes a v, one weight for each zᵢ, and gives vᵀJ in a single pass. So `backward()` without a
    v has no answer where the result is not a single number. As ever, it adds to what the leaf already has.
    """
    x = torch.tensor(X, requires_grad=True)
    v = torch.tensor([0.1, 1.0, 0.001])

    def z(inputs: Tensor) -> Tensor:
        return 2 * (inputs + 2) ** 2

    z(x).mean().backward()
    with mistake("backward() without v"):
        z(x).backward()
    z(x).backward(v)
    show("x.grad: the mean's plus vᵀJ", x.grad)

    jacobian = torch.func.jacrev(z)(x.detach())
    show("J by torch.func.jacrev", jacobian)
    show("vᵀJ by hand", v @ jacobian)
    show("4y/3 + vᵀJ", 4 * (x + 2) / 3 + v @ jacobian)


# %%
@idea
def accumulation() -> None:
    """`backward()` adds to `.grad`; it does not replace it.

    That is what makes one large step out of several small batches. It is also the best-known mistake of all:
    who forgets to clear the gradient follows the sum of all that ever were.
    """
    weights = torch.ones(4, requires_grad=True)
    for epoch in (1, 2, 3):
        (3 * weights).sum().backward()
        show(f"epoch {epoch}", weights.grad)

    weights = torch.ones(4, requires_grad=True)
    for epoch in (1, 2, 3):
        (3 * weights).sum().backward()
        show(f"epoch {epoch}, with grad.zero_()", weights.grad)
        assert weights.grad is not None
        weights.grad.zero_()


# %%
@idea
def optimizer_step() -> None:
    """An optimizer steps and clears for all its parameters at once.

    `step()` subtracts learning rate × gradient. `zero_grad()` clears: by default to None, which saves the
    memory and lets the optimizer pass over a parameter that got no gradient; `set_to_none=False` leaves
    zeros.
    """
    weights = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.01)
    for epoch in (1, 2, 3):
        (3 * weights).sum().backward()
        show(f"epoch {epoch}, gradient", weights.grad)
        optimizer.step()
        optimizer.zero_grad()
    show("weights: 1 − 3 · 0.01 · 3", weights)
    show("after zero_grad()", weights.grad)
    (3 * weights).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    show("after set_to_none=False", weights.grad)


# %%
@idea
def gradient_descent() -> None:
    """Gradient descent, θₜ₊₁ = θₜ − η·∇L(θₜ), four ways: equal to the bit.

    By hand, with torch.optim.SGD, with Lightning's manual optimization and with its automatic one: whoever
    holds the loop, it is the same three lines. Twenty steps from zero on y = Wx + b.
    """
    ways = {
        "by hand": by_hand,
        "torch.optim.SGD": by_optimizer,
        "model=manual": lambda: by_lightning("manual"),
        "model=automatic": lambda: by_lightning("automatic"),
    }
    found = {name: descend() for name, descend in ways.items()}
    for name, (weight, bias) in found.items():
        show(name, f"W = {_digits(weight)}  b = {_digits(bias)}")
    weight, bias = found["by hand"]
    same = all(torch.equal(w, weight) and torch.equal(b, bias) for w, b in found.values())
    show("equal to the bit", same)


LEARNING_RATE, NUM_STEPS = 0.1, 20


def line_data() -> tuple[Tensor, Tensor]:
    """Returns 32 rows of two features, and a target on a line of them with noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 2, generator=generator)
    noise = 0.1 * torch.randn(32, generator=generator)
    return features, features @ torch.tensor([2.0, -1.0]) + 0.5 + noise


def by_hand() -> tuple[Tensor, Tensor]:
    """The loop, with nothing hidden."""
    features, target = line_data()
    weight, bias = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, requires_grad=True)
    for _ in range(NUM_STEPS):
        prediction = nn.functional.linear(features, weight, bias).squeeze(-1)  # Wx + b
        loss = (prediction - target).square().mean()
        loss.backward()
        with torch.no_grad():  # the step is no part of the graph
            for parameter in (weight, bias):
                assert parameter.grad is not None
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return weight.detach(), bias.detach()


def by_optimizer() -> tuple[Tensor, Tensor]:
    """The step left to torch.optim.SGD."""
    features, target = line_data()
    line = zeroed(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(line.parameters(), lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(line(features).squeeze(-1), target).backward()
        optimizer.step()
    return line.weight.detach(), line.bias.detach()


def by_lightning(model: str) -> tuple[Tensor, Tensor]:
    """The loop left to a Trainer; in the manual model the cycle is the model's own."""
    from lightning import Trainer

    from downslope.tables.batches import Batches
    from template.regression.manual import ManualLinearRegression
    from template.regression.model import LinearRegression

    with quiet():
        module = {"manual": ManualLinearRegression, "automatic": LinearRegression}[model](
            num_features=2,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
            scheduler={"scheduler": None},
        )
        zeroed(module.linear)
        trainer = Trainer(
            max_epochs=NUM_STEPS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, Batches(*line_data(), batch_size=32))  # all rows in a batch: a step an epoch
    return module.linear.weight.detach(), module.linear.bias.detach()


def zeroed(line: nn.Linear) -> nn.Linear:
    """Starts a line where all four start: at 0."""
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    return line


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's tips and warnings, which mean nothing here, from between the numbers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _digits(tensor: Tensor) -> str:
    return "[" + ", ".join(f"{value:.9f}" for value in tensor.flatten().tolist()) + "]"


# %%
@idea
def learning_rates() -> None:
    """Three learning rates: too small, right, too large.

    The loss of a line is a bowl, and λ, the largest eigenvalue of its Hessian, is how steep its steepest side
    bends. Along it a step multiplies the distance to the bottom by 1 − ηλ: above η = 2/λ by more than 1 in
    size, so that every step lands higher on the other side.
    """
    from downslope.gradients.least_squares import least_squares

    features, target = line_data()
    line = least_squares(features, target)
    limit = line.largest_stable_learning_rate
    show("λ", line.sharpness)
    show("limit, 2/λ", limit)
    show("least loss of any line", line.loss)
    for label, share in (("too small", 0.01), ("right", 0.5), ("too large", 1.3)):
        weight, bias = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
        losses = []
        for _ in range(NUM_STEPS + 1):
            loss = (features @ weight + bias - target).square().mean()
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, (weight, bias))
            with torch.no_grad():
                for parameter, gradient in zip((weight, bias), gradients, strict=True):
                    parameter -= share * limit * gradient
        show(f"{label}: {share * limit:.4f} = {share:g} × 2/λ", f"loss {losses[0]:.4f} → {losses[-1]:.4f}")


# %%
@idea
def in_place() -> None:
    """Two edits in place that autograd refuses.

    A leaf that is changed in place would be both the beginning and a result of the graph. And an operation
    may need its output again on the way back, as exp does: who overwrites it takes it away.
    """
    weights = torch.ones(3, requires_grad=True)
    with mistake("weights += 1"):
        weights += 1
    with torch.no_grad():
        weights += 1
    show("remedy: under no_grad", weights)

    grown = weights.exp()
    grown *= 2
    with mistake("exp, edited before backward"):
        grown.sum().backward()
    grown = weights.exp()
    doubled = grown * 2
    doubled.sum().backward()
    show("remedy: a new tensor", weights.grad)


# %%
@idea
def freed_graph() -> None:
    """`backward()` frees the graph as it goes: a second pass has nothing to walk.

    Usually a second pass is a mistake, and the remedy is to compute the loss anew. `retain_graph=True` keeps
    the graph where it is meant.
    """
    x = torch.tensor(3.0, requires_grad=True)
    loss = x**2
    loss.backward()
    with mistake("backward() again"):
        loss.backward()
    x.grad = None
    loss = x**2
    loss.backward(retain_graph=True)
    loss.backward()
    show("remedy: retain_graph=True, 6 + 6", x.grad)


# %%
@idea
def double_backward() -> None:
    """A gradient can be differentiated too, if its own computation was recorded.

    By default it is not: `create_graph=True` asks for it. So x³ gives 3x², and that gives 6x.
    """
    x = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(x**3, x)
    with mistake("the slope's own gradient"):
        torch.autograd.grad(slope, x)
    (slope,) = torch.autograd.grad(x**3, x, create_graph=True)
    (bend,) = torch.autograd.grad(slope, x)
    show("remedy: create_graph=True, 3x²", slope)
    show("its own gradient, 6x", bend)


# %%
def main(arguments: list[str] | None = None) -> None:
    """Runs the ideas that were asked for."""
    global PICTURE
    parser = argparse.ArgumentParser(description="The ideas of autograd, one by one, with their numbers.")
    parser.add_argument("--list", action="store_true", help="list the ideas without running any")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these ideas, in this order")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw the idea `graph` into a .svg, .png or .pdf, with graphviz",
    )
    options = parser.parse_args(arguments)
    if options.list:
        for name, function in IDEAS.items():
            print(f"{name:<18} {(function.__doc__ or '').splitlines()[0]}")
        return
    for name in options.only or ():
        if name not in IDEAS:
            nearest = difflib.get_close_matches(name, IDEAS, n=1)
            way_out = f"Did you mean `{nearest[0]}`?" if nearest else "All ideas: --list."
            raise ValueError(f"`{name}` is not an idea of the tour. {way_out}")
    PICTURE = options.picture
    for name in options.only or IDEAS:
        run(name)


if __name__ == "__main__" and not hasattr(builtins, "__IPYTHON__"):
    with refusing("autograd_tour"):
        main()
