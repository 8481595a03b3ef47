"""DPO from its objective to its loss, every step verified by enumeration; beside it, what the trainers reach.

accelerate launch recipes/problems/dpo_theory.py known_optimum=runs/known_optimum output_dir=runs/dpo_theory beta=0.2
"""

from pipelines.problems.dpo_theory import dpo_theory
from pipelines.recipe import recipe

main = recipe(dpo_theory, __doc__)

if __name__ == "__main__":
    main()
