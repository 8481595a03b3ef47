"""From a finished stage's folder to a repository on the Hub: what is pushed, its card, the rights, the way there."""
