"""Changes to how guidance combines two predictions, and to the latent that each step leads to."""

from __future__ import annotations

from typing import Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ..files.trajectory import Trajectory
from ..run.model import add_outermost
from ..run.refusals import OURS, check_in_place, check_one_state, check_run, check_same_model
from .source import STATE

KEY = f"{OURS}Proximal Guidance"  # the key of the one that pulls: each has its node's


class Rule(Protocol):
    """node: the display name of the node that made it.

    needs_negative: whether the negative prompt has to run, also at cfg 1, where the host leaves it out.
    """

    node: str
    needs_negative: bool

    def guided(self, difference: Tensor, cfg: float) -> Tensor:
        """What guidance multiplies by cfg, instead of the positive's denoised estimate less the negative's
        [b, c, (t,) h, w].
        """


class Pull(Rule, Protocol):
    def unchanged(self, difference: Tensor) -> Tensor:
        """[b, c, h, w] in 0..1: where that difference changes nothing."""

    def pulls(self, fraction: float) -> bool:
        """Whether `pulled` applies to the step that starts where `fraction` (0 to 1) of the schedule is finished."""

    def pulled(self, x: Tensor, unchanged: Tensor, denoised: Tensor, state: Tensor, image: Tensor) -> Tensor:
        """The latent x to go on with after a step, given its denoised estimate, and the source's state and image."""


class _Run:
    """What one sampling run has found so far."""

    def __init__(self, rule: Rule | Pull, trajectory: Trajectory | None) -> None:
        self.rule, self.trajectory = rule, trajectory
        self.asked = False
        self.unchanged: Tensor | None = None  # of the last call that was guided: another pack may skip one
        self.steps: dict[int, tuple[Tensor, Tensor]] = {}  # by step: where it changed nothing, and its estimate

    def note(self, index: int | None, denoised: Tensor) -> None:
        if index is not None and self.unchanged is not None and self.rule.pulls(index / self.trajectory.steps):
            self.steps[index] = self.unchanged, denoised

    def pulled(self, x: Tensor, index: int | None) -> Tensor:
        """x at a step of the trajectory, pulled by what the step before it found."""
        found = None if index is None else self.steps.get(index - 1)
        if found is None:
            return x
        state, image = (self.trajectory.states[at].to(x) for at in (index, -1))
        return self.rule.pulled(x, *found, state, image)


def attach_rule(model: ModelPatcher, rule: Rule | Pull, trajectory: Trajectory | None = None) -> ModelPatcher:
    """A clone of `model` that is guided by `rule`; with a trajectory that is a `Pull`, without one nothing is pulled.

    Raises ValueError where the trajectory is another model's, or the model has such a rule already.
    """
    node, key = rule.node, f"{OURS}{rule.node}"
    if key in model.wrappers.get(WrappersMP.PREDICT_NOISE, {}):
        raise ValueError(f"This MODEL already carries a {node}: one is enough, remove the other.")
    if trajectory is not None:
        check_same_model(model, trajectory)
        trajectory = trajectory if rule.pulls(1.0) else None

    def outer_sample(executor, noise: Tensor, latent: Tensor, sampler: Sampler, sigmas: Tensor, mask, *args, **kwargs):
        if trajectory is not None:
            check_run(trajectory, executor.class_obj, noise, latent, sampler, sigmas, mask)
            check_in_place(sampler, node)
        return executor(noise, latent, sampler, sigmas, mask, *args, **kwargs)

    def sampler_sample(executor, guider: CFGGuider, sigmas: Tensor, extra_args: dict, *args) -> Tensor:
        run, model_options = _Run(rule, trajectory), extra_args["model_options"]
        options = {**model_options["transformer_options"], key: run}
        extra_args = {**extra_args, "model_options": {**model_options, "transformer_options": options}}
        x = executor(guider, sigmas, extra_args, *args)
        return x if trajectory is None else run.pulled(x, trajectory.index(float(sigmas[-1])))

    def predict_noise(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs) -> Tensor:
        options = model_options["transformer_options"]
        run, index = options[key], None
        if trajectory is not None:
            if STATE in options:
                check_one_state([node])
            index = trajectory.index(float(timestep[0]))
            x.copy_(run.pulled(x, index))  # in place: the step that the sampler takes starts here
        denoised = executor(x, timestep, model_options, *args, **kwargs)
        if not run.asked:
            raise ValueError(
                f"{node} has no effect in the guider {type(executor.class_obj).__name__}, which combines predictions "
                "by itself: use CFGGuider or a KSampler."
            )
        run.note(index, denoised)
        return denoised

    def before(args: dict) -> list[Tensor]:
        run = args["model_options"]["transformer_options"][key]
        run.asked = True
        positive, negative, *others = args["conds_out"]
        if others and rule.needs_negative:
            raise ValueError(
                f"{node} guides from the negative prompt, but this run's guider from a third one: use CFGGuider or a "
                "KSampler in place of Perp-Neg Guider."
            )
        if args["conds"][1] is None:
            if rule.needs_negative:
                raise ValueError(
                    f"{node} compares the prompt with the negative one, of which this run has none: use CFGGuider or a "
                    "KSampler, and connect the source prompt to negative."
                )
            run.unchanged = None
            return args["conds_out"]
        if trajectory is not None:
            run.unchanged = rule.unchanged(positive - negative)
        return [negative + rule.guided(positive - negative, args["cond_scale"]), negative, *others]

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, sampler_sample)
    add_outermost(model, WrappersMP.PREDICT_NOISE, key, predict_noise)
    model.set_model_sampler_pre_cfg_function(before, disable_cfg1_optimization=rule.needs_negative)
    return model
