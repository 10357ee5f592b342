"""What `import sltt` and the start of the command line import, and what waits until it is needed."""

import subprocess
import sys

HEAVY = """torch._dynamo torch._inductor jsonargparse lightning_fabric matplotlib scipy tensorboard tonic torchvision
nir nirtorch norse onnx onnxruntime sinabs snntorch spikingjelly triton"""


def printed(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_name_is_there_and_a_training_imports_no_heavy_library(tmp_path):
    code = """if True:
        import sys, torch
        before = {*sys.modules}
        import sltt
        assert {*sltt.__all__, "__version__"} <= {*dir(sltt)}
        assert not any(hasattr(sltt, name) for name in ("SLT", "a.<locals>"))
        sltt.data.Digits, sltt.models.MLP, sltt.interop.convert, sltt.devices.make_fabric, sltt.kernels.using
        sltt.rules.base.Batch, sltt.training.fit.Fit, sltt.training.progress.Metrics
        from sltt import *
        assert SLTT is sltt.SLTT

        class Own(sltt.neurons.Neuron):
            states = ("v",)
            v: torch.Tensor | None

            @staticmethod
            def step(x, v):
                return sltt.surrogates.Triangle()(v + x - 1), v

        model = torch.nn.Sequential(torch.nn.Linear(9, 8), LIF(), torch.nn.Linear(8, 7), Own())
        SLTT()(model, torch.rand(4, 2, 9), torch.tensor([1, 2]), torch.nn.functional.cross_entropy)
        print(*{*sys.argv[1].split()} & ({*sys.modules} - before))
        data = sltt.data.from_datasets([(torch.rand(9), i % 7) for i in range(20)], static=True)
        sltt.fit(model, data, steps=4, epochs=2, run=sys.argv[2], device="cpu")
        print(*{"torch._dynamo", "torchmetrics", "scipy", "matplotlib", "torchvision"} & sys.modules.keys())
        from sltt._torch import without_compiler
        with without_compiler(lambda params: None):  # a function may do anything
            assert "torch._dynamo" not in sys.modules
        add = torch.optim.Optimizer.add_param_group.__wrapped__
        with without_compiler():
            torch.optim.SGD(model.parameters(), lr=0.1)
            assert "__dynamo_disable" in vars(add)
            print(torch._dynamo.config.__name__)
            assert "__dynamo_disable" not in vars(add)
        assert sys.modules["torch._dynamo"].OptimizedModule
        torch.optim.SGD(model.parameters(), lr=0.1)
        assert vars(add)["__dynamo_disable"] is not add"""
    imported, *_, after_training, config = printed(code, HEAVY, str(tmp_path / "run"))
    assert [imported, after_training, config] == ["", "", "torch._dynamo.config"]


def test_the_command_line_starts_without_pytorch():
    code = """if True:
        import sys
        from sltt.commands import main
        print(*(main([word]) for word in ("--help", "--version", "trian")))
        print(*{*sys.argv[1].split()} & {*sys.modules})"""
    assert printed(code, f"torch numpy yaml rich {HEAVY}")[-2:] == ["0 0 2", ""]
