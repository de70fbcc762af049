"""A run's configuration: typed sections, YAML in, dotted overrides, resolved YAML out.

config = Config.load("student.yaml", ["train.steps=20", "teacher.checkpoint=runs/teacher/last"])
dp = check_ranks(config, world_size)
config.save(f"{config.run.dir}/config.yaml")
"""

from megakd.config.cache import Cache
from megakd.config.checks import check_experts, check_features, check_model, check_ranks, check_vocab
from megakd.config.config import Config
from megakd.config.eval import Eval, Generate
from megakd.config.features import Features
from megakd.config.log import Log, Profile
from megakd.config.loss import Loss
from megakd.config.model import MLA, Model, MoE, RopeScaling
from megakd.config.parallel import Parallel, Pipeline
from megakd.config.prune import Prune
from megakd.config.reference import format_reference, section_summaries
from megakd.config.rollouts import Rollouts
from megakd.config.routing import Routing
from megakd.config.section import Section
from megakd.config.sections import (
    Checkpoint,
    Data,
    Export,
    Optimizer,
    Run,
    Schedule,
    Student,
    Teacher,
    Train,
)
from megakd.config.teachers import NamedTeacher, paths_of

__all__ = [
    "MLA",
    "Cache",
    "Checkpoint",
    "Config",
    "Data",
    "Eval",
    "Export",
    "Features",
    "Generate",
    "Log",
    "Loss",
    "MoE",
    "Model",
    "NamedTeacher",
    "Optimizer",
    "Parallel",
    "Pipeline",
    "Profile",
    "Prune",
    "Rollouts",
    "RopeScaling",
    "Routing",
    "Run",
    "Schedule",
    "Section",
    "Student",
    "Teacher",
    "Train",
    "check_experts",
    "check_features",
    "check_model",
    "check_ranks",
    "check_vocab",
    "format_reference",
    "paths_of",
    "section_summaries",
]
