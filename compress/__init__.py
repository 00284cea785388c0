"""Everything that changes weights or tokens.

A stage (vocab, layers, ffn) makes a plan from the model and a calibration corpus, and applies it. Importing this
package imports no framework; its modules that compute import torch.
"""
