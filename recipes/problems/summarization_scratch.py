"""A summarizer from scratch against a fine-tuned one, ROUGE with intervals, and both beside a prompted model.

accelerate launch recipes/problems/summarization_scratch.py evaluation=runs/scratch_vs_finetuned/evaluate
python recipes/problems/summarization_scratch.py evaluation=FOLDER scratch=NAME finetuned=NAME prompting=FOLDER
"""

from pipelines.problems.summarization_scratch import summarization_scratch
from pipelines.recipe import recipe

main = recipe(summarization_scratch, __doc__)

if __name__ == "__main__":
    main()
