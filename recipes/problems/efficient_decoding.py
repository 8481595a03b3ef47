"""What a decoder's key/value cache computes and saves: equality, counted work, seconds, fitted exponents.

accelerate launch recipes/problems/efficient_decoding.py
python recipes/problems/efficient_decoding.py width=192 target_lengths='[16, 64, 256]'
"""

from pipelines.problems.efficient_decoding import efficient_decoding
from pipelines.recipe import recipe

main = recipe(efficient_decoding, __doc__)

if __name__ == "__main__":
    main()
