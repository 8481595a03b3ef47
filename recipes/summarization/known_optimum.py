"""How near each method comes to the optimum, in a world whose completions can all be enumerated (no data needed).

accelerate launch recipes/summarization/known_optimum.py output_dir=runs/known_optimum length=3 rollouts=150
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.known_optimum import known_optimum

main = recipe(known_optimum, __doc__)

if __name__ == "__main__":
    main()
