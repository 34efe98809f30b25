"""What stands where istio-iptables stood: the same settings, by netapply's transaction.

facts       what Istio looks up on the machine
leftovers   what Istio itself may have left in a namespace
run         settings → plan → apply, clean or text
validation  whether the rules that stand capture a connection
"""
