"""What a prompt alone can do: strategies, confidence, temperature and learnt prompts, from finished prompting stages.

accelerate launch recipes/problems/prompting.py hard=runs/h/hard explore=runs/h/explore compare=runs/h/compare
"""

from pipelines.problems.prompting import prompting
from pipelines.recipe import recipe

main = recipe(prompting, __doc__)

if __name__ == "__main__":
    main()
