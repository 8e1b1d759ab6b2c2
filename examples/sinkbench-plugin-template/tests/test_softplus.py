def test_softplus(check_plugin):
    check_plugin("softplus", kind="attention")
