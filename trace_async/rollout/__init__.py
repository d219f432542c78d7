"""One prompt's life: messages to tokens, roots, values, continuations, one tree. Imports trees and method."""
