"""The sections of the report, in the order in which they stand on the page.

Each is a function ``(run) -> Section, sections or None`` in a file of its own; a family adds its functions to
``SECTIONS``.
"""

from pipelines.reporting.page import SectionWriter
from pipelines.reporting.sections.best_of_n import best_of_n
from pipelines.reporting.sections.curves import learning_curves
from pipelines.reporting.sections.data import data
from pipelines.reporting.sections.examples import examples
from pipelines.reporting.sections.few_examples import few_examples
from pipelines.reporting.sections.images import images
from pipelines.reporting.sections.images_training import images_training
from pipelines.reporting.sections.known_optimum import known_optimum
from pipelines.reporting.sections.ppo import ppo
from pipelines.reporting.sections.problems import problems
from pipelines.reporting.sections.prompting import prompting
from pipelines.reporting.sections.prompting_compare import prompting_compare
from pipelines.reporting.sections.prompting_explore import prompting_explore
from pipelines.reporting.sections.results import results
from pipelines.reporting.sections.reward import reward_model
from pipelines.reporting.sections.vae_blur import vae_blur

SECTIONS: tuple[SectionWriter, ...] = (
    problems,
    results,
    few_examples,
    examples,
    ppo,
    best_of_n,
    known_optimum,
    reward_model,
    prompting_compare,
    prompting,
    prompting_explore,
    images,
    images_training,
    vae_blur,
    learning_curves,
    data,
)
