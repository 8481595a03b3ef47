"""The problem set: exercises that compute their answer, check it by an independent route and draw it."""
