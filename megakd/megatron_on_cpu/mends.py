"""Four bugs of Megatron-Core's distributed optimizer, mended; each has a test that fails without its mend.

1. torch Adam: loading a checkpoint looks up a key 'step' that is never saved.
2. torch Adam: after a load all parameters share one step counter, which one step() then advances once per parameter.
3. torch Adam: an optimizer that has never stepped, or has no parameter (that of experts on a pipeline stage without
   any), cannot describe its state.
These three occur on CUDA too when neither Transformer Engine nor Apex is installed, and never with them.
4. any Adam: in a checkpoint that can be resharded, master weights and moments of all but the first bucket of
   gradients are cut out as many elements too late as buckets before were padded, and zeros take the place of the
   last. Buckets are padded to a multiple of 128 and of the data-parallel size: a run of 24 ranks that overlaps its
   reductions went on from shifted weights. Upstream warns ("can lead to data corruption").
0.16.1, 0.17.1, 0.18.2 and 0.19.2 have all four. Where one of the first three is gone its mend changes nothing: it fills
in what is missing and copies what might be shared; the fourth looks whether its bug is there. What is mended of single
layers is in megakd.models.moe.
"""

import torch


def mend_distributed_optimizer() -> None:
    """Mend bugs 1 to 3 of the module docstring; nothing with Transformer Engine or Apex, whose Adam has no step."""
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(cls, "megakd_upstream"):
        return
    upstream = (cls._set_main_param_and_optimizer_states, cls.load_state_dict, cls.sharded_state_dict)
    set_states, load_state_dict, sharded_state_dict = cls.megakd_upstream = upstream
    state_dict = cls.state_dict

    def set_states_with_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": self.optimizer.state[main_param]["step"]})

    def load_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def describe_even_when_fresh(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)

    def describe_even_when_empty(self):
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": [group | {"step": 0} for group in groups]}}

    cls.state_dict = describe_even_when_empty
    cls._set_main_param_and_optimizer_states = set_states_with_step
    cls.load_state_dict = load_with_own_steps
    cls.sharded_state_dict = describe_even_when_fresh


def mend_buckets() -> None:
    """Mend bug 4 of the module docstring, as long as upstream says that it pads what it has lost."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(upstream, "megakd_upstream") or not says(upstream, "padded with zeros"):
        return

    def describe_where_they_are(self, *args, **kwargs):
        places = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = places_without_padding(buffer)
            return upstream(self, *args, **kwargs)
        finally:
            for buffer, place in zip(self.buffers, places, strict=True):
                buffer.param_index_map = place

    describe_where_they_are.megakd_upstream = upstream
    DistributedOptimizer.sharded_param_state_fully_reshardable = describe_where_they_are


def says(function, text: str) -> bool:
    """Whether one of the function's own strings has the text: to be seen where no source is installed too."""
    return any(isinstance(constant, str) and text in constant for constant in function.__code__.co_consts)


def places_without_padding(buffer) -> dict:
    """Where a buffer's parameters are once the padding at the ends of its buckets is taken out: {parameter: (start,
    stop, bucket)}, as Megatron gathers them."""
    shifts, place = [], 0
    for bucket in buffer.buckets:
        shifts.append(place - bucket.offset)
        place += bucket.numel_unpadded
    return {
        parameter: (start + shifts[number], stop + shifts[number], number)
        for parameter, (start, stop, number) in buffer.param_index_map.items()
    }
